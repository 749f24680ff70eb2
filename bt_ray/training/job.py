"""The owner's side of a fine-tune: the job file, the command, the wait, and what the child left."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bt_ray.child import ChildProcess
from bt_ray.config import ServerConfig, TrainConfig
from bt_ray.errors import ConfigError, TaskError, TrainingError
from bt_ray.weights import Weights, read_manifest


@dataclass(frozen=True)
class TrainJob:
    """Everything that one training process needs to know; travels as a JSON file.

    Attributes:
        parent: The weights to start from.
        weights_id: The id of the result.
        output_dir: The folder for the result: safetensors, tokenizer, manifest.
        data_file: Conversations, one `{"messages": [...]}` a line; the last message is what to learn.
        conversations: Their number.
        progress_file: Where the child appends a line for each optimizer step.
        config: `[train]`.
        seed: For the order of the data and the initial adapter.
        gpus: Whole GPUs to train on; 0 for CPU.
        threads: Compute threads on CPU.
    """

    parent: Weights
    weights_id: str
    output_dir: str
    data_file: str
    conversations: int
    progress_file: str
    config: TrainConfig
    seed: int
    gpus: int
    threads: int

    def write(self, path: Path) -> None:
        values = {**vars(self), "parent": self.parent.to_json(), "config": self.config.model_dump(mode="json")}
        path.write_text(json.dumps(values))

    @classmethod
    def read(cls, path: Path) -> Self:
        values = json.loads(path.read_text())
        return cls(
            **{**values, "parent": Weights(**values["parent"]), "config": TrainConfig.model_validate(values["config"])}
        )

    @property
    def refusal_file(self) -> Path:
        """Where the child says why the data cannot be trained on."""
        return Path(f"{self.output_dir}.refused.txt")

    @property
    def command(self) -> list[str]:
        if self.config.command:
            return list(self.config.command)
        if self.gpus > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus)]
            return [*launcher, "-m", "bt_ray.training.main"]
        return [sys.executable, "-m", "bt_ray.training.main"]


def check_trainable(config: ServerConfig, train: TrainConfig) -> None:
    """Raises `ConfigError` if a slot of this kind cannot train like this."""
    if config.gpus != int(config.gpus):
        raise ConfigError(f"A slot with {config.gpus} of a GPU only serves: give `server.gpus` whole GPUs to train.")
    if config.gpus > 1 and train.batch_size % int(config.gpus):
        raise ConfigError(
            f"train.batch_size = {train.batch_size} cannot be shared out over the {config.gpus:g} GPUs of a slot: "
            "make it a multiple."
        )


def start_training(job: TrainJob, env: Mapping[str, str], log_file: Path) -> ChildProcess:
    """Start the training process of `job`."""
    job_file = Path(f"{job.output_dir}.job.json")
    job_file.parent.mkdir(parents=True, exist_ok=True)
    job.write(job_file)
    env = {**env, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    return ChildProcess([*job.command, str(job_file)], env=env, log_file=log_file)


def finish_training(job: TrainJob, process: ChildProcess) -> Weights:
    """Wait until `process` has ended and return the weights that it left.

    Raises:
        TrainingError: It died, was ended, or took longer than `train.timeout_s`.
        TaskError: It found that the data cannot be trained on.
    """
    status = process.wait(job.config.timeout_s)
    if status is None:
        process.stop()
        raise TrainingError(f"Training {job.weights_id} took longer than {job.config.timeout_s} s and was ended.")
    if (refusal := job.refusal_file).exists():
        raise TaskError(refusal.read_text())
    try:
        return read_manifest(Path(job.output_dir))
    except FileNotFoundError:
        tail = process.log_tail()
        raise TrainingError(f"Training {job.weights_id} ended with status {status}. Its last lines:\n{tail}") from None


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
