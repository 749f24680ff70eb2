"""The owner's side of a fine-tune: the job file, the command, the wait, and what the child left."""

import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bt_ray.errors import ConfigError, TaskError, TrainingError
from bt_ray.settings.config import ServerConfig, TrainConfig
from bt_ray.slot.arithmetic import Dtype, cpu_arithmetic
from bt_ray.slot.child import ChildProcess
from bt_ray.weights import MANIFEST, Weights

LOOK_S = 2.0
CHECKPOINT_MANIFEST, PROGRESS = "bt_ray_checkpoint.json", "progress.jsonl"


@dataclass(frozen=True)
class TrainJob:
    """Everything that one training process needs to know; travels as a JSON file.

    Attributes:
        parent: The weights to start from.
        weights_id: The id of the result.
        folder: Where the process works. `data.jsonl` has the conversations, one `{"messages": [...]}` a line, of which the
            last message is what to learn; `progress.jsonl` gets a line for each optimizer step; `checkpoints/` what it can
            go on from.
        output_dir: The folder for the result: safetensors, tokenizer, manifest.
        adapter: Whether the result is the LoRA adapter alone, rather than a whole checkpoint.
        checkpoint: The checkpoint to go on from, None for the beginning.
        conversations: Their number.
        config: `[train]`.
        dtype: What the products of matrices are computed in.
        seed: For the order of the data and the initial adapter.
        gpus: Whole GPUs to train on; 0 for CPU.
        threads: Compute threads on CPU.
    """

    parent: Weights
    weights_id: str
    folder: str
    output_dir: str
    adapter: bool
    checkpoint: str | None
    conversations: int
    config: TrainConfig
    dtype: Dtype
    seed: int
    gpus: int
    threads: int

    def write(self) -> None:
        values = {**vars(self), "parent": self.parent.to_json(), "config": self.config.model_dump(mode="json")}
        self.file.write_text(json.dumps(values))

    @classmethod
    def read(cls, path: Path) -> Self:
        values = json.loads(path.read_text())
        parent, config = Weights.from_json(values["parent"]), TrainConfig.model_validate(values["config"])
        return cls(**{**values, "parent": parent, "config": config})

    @property
    def file(self) -> Path:
        return Path(self.folder, "job.json")

    @property
    def data_file(self) -> Path:
        return Path(self.folder, "data.jsonl")

    @property
    def progress_file(self) -> Path:
        return Path(self.folder, PROGRESS)

    @property
    def log_file(self) -> Path:
        return Path(self.folder, "log.txt")

    @property
    def refusal_file(self) -> Path:
        """Where the child says why the data cannot be trained on."""
        return Path(self.folder, "refused.txt")

    @property
    def command(self) -> list[str]:
        if self.config.command:
            return list(self.config.command)
        if self.gpus > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus)]
            return [*launcher, "-m", "bt_ray.slot.training.main"]
        return [sys.executable, "-m", "bt_ray.slot.training.main"]


def check_trainable(config: ServerConfig, train: TrainConfig) -> None:
    """Raises `ConfigError` if a slot of this kind cannot train like this."""
    if config.gpus != int(config.gpus):
        raise ConfigError(f"A slot with {config.gpus} of a GPU only serves: give `server.gpus` whole GPUs to train.")
    if config.gpus > 1 and train.batch_size % int(config.gpus):
        raise ConfigError(
            f"train.batch_size = {train.batch_size} cannot be shared out over the {config.gpus:g} GPUs of a slot: "
            "make it a multiple."
        )
    if config.adapters and train.method != "lora":
        raise ConfigError('server.fine_tunes = "adapters" needs train.method = "lora": a full fine-tune leaves no adapter.')
    if config.adapters and train.lora_rank > config.max_lora_rank:
        raise ConfigError(
            f"train.lora_rank = {train.lora_rank} is more than server.max_lora_rank = {config.max_lora_rank}, which is what "
            "the servers load: raise the one or lower the other."
        )


def training_dtype(server: ServerConfig, train: TrainConfig) -> Dtype:
    """What a training in a slot on this node computes in: as written, else bfloat16, unless a CPU is slow in it.

    Raises:
        ServerError: The processor's arithmetic could not be measured.
    """
    if train.dtype != "auto":
        return train.dtype
    return "bfloat16" if server.gpus or train.command else cpu_arithmetic(server.env).dtype


def training_key(
    parent: Weights, conversations: Sequence[Mapping[str, Any]], config: TrainConfig, seed: int, *, adapter: bool
) -> str:
    """Names a fine-tune after all that its result depends on: equal names, equal fine-tunes."""
    versions = {package: _version(package) for package in ("torch", "transformers", "trl", "peft")}
    text = json.dumps([parent.id, list(conversations), config.of_the_result(), seed, adapter, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def start_training(job: TrainJob, conversations: Sequence[Mapping[str, Any]], env: Mapping[str, str]) -> ChildProcess:
    """Start the training process of `job` on these conversations."""
    job.data_file.write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    job.write()
    env = {**env, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    return ChildProcess([*job.command, str(job.file)], env=env, log_file=job.log_file)


def finish_training(job: TrainJob, process: ChildProcess, look: Callable[[], None]) -> None:
    """Wait until `process` has ended and its weights are there.

    Args:
        job: Its job.
        process: The training.
        look: Called every few seconds until then.

    Raises:
        TrainingError: It died, was ended, or took longer than `train.timeout_s`.
        TaskError: It found that the data cannot be trained on.
    """
    deadline = time.monotonic() + (job.config.timeout_s or float("inf"))
    while (status := process.wait(min(LOOK_S, deadline - time.monotonic()))) is None:
        look()
        if time.monotonic() >= deadline:
            process.stop()
            raise TrainingError(f"Training {job.weights_id} took longer than {job.config.timeout_s} s and was ended.")
    if (refusal := job.refusal_file).exists():
        raise TaskError(refusal.read_text())
    if not Path(job.output_dir, MANIFEST).exists():
        tail = process.log_tail()
        raise TrainingError(f"Training {job.weights_id} ended with status {status}. Its last lines:\n{tail}")


def checkpoint_step(checkpoint: str) -> int:
    """The optimizer step after which a checkpoint was written, from its name: `checkpoint-12`."""
    return int(checkpoint.rpartition("-")[2])


def read_progress(path: Path) -> Iterator[dict[str, Any]]:
    """The optimizer steps so far: `{"step", "steps", "epoch", "loss"}`, oldest first."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return  # the last line is being written
