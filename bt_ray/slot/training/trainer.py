"""TRL's `SFTTrainer` as a fine-tune uses it: its settings, its checkpoints, its batches, and a loss that is fast on CPU."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from bt_ray.layout import CHECKPOINTS
from bt_ray.settings.config import TrainConfig
from bt_ray.slot.training.batches import BatchesByLength, worth_sorting
from bt_ray.slot.training.cores import IdleCores
from bt_ray.slot.training.job import CHECKPOINT_MANIFEST, TrainJob
from bt_ray.slot.training.layers import last_layers, linear_modules

IGNORED = -100
"""The label of a token that has no part in the loss."""
TENSOR, MAPPING = "__tensor__", "__mapping__"


class Trainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` whose checkpoints are safetensors and JSON: nothing in a run directory is unpickled.

    The states of optimizer, schedule and random numbers, which transformers pickles, are written by `write_state`; its
    arguments, which it pickles too, are left out. Conversations of about the same length make a batch.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        lengths = [len(tokens) for tokens in self.train_dataset["input_ids"]]
        batch_size = self.args.per_device_train_batch_size
        if not worth_sorting(lengths, batch_size):
            return super()._get_train_sampler(train_dataset)
        return BatchesByLength(lengths, batch_size, self.args.seed, lambda: int(self.state.epoch or 0))

    def _save(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            write_state(Path(output_dir, "optimizer"), self.optimizer.state_dict())
            write_state(Path(output_dir, "scheduler"), self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(read_state(Path(checkpoint, "optimizer")))
            self.lr_scheduler.load_state_dict(read_state(Path(checkpoint, "scheduler")))

    def _save_rng_state(self, output_dir: str) -> None:
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_state(Path(output_dir, f"random-{self.args.process_index}"), state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_state(Path(checkpoint, f"random-{self.args.process_index}"))
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


# Without one of these in transformers a checkpoint would be a pickle, and nothing would say so.
assert all(hasattr(SFTTrainer, name) for name in vars(Trainer) if not name.startswith("__"))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a nested state of tensors and plain values as `path.safetensors` and `path.json`."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {TENSOR: name}
        if isinstance(value, dict):
            return {MAPPING: [[key, plain(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [plain(item, f"{name}.{index}") for index, item in enumerate(value)]
        return value

    values = plain(state, "")
    save_file(tensors, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(values))


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote; tuples come back as lists."""
    tensors = load_file(f"{path}.safetensors")

    def state(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[TENSOR]] if TENSOR in value else {key: state(item) for key, item in value[MAPPING]}
        return [state(item) for item in value] if isinstance(value, list) else value

    read: dict[str, Any] = state(json.loads(Path(f"{path}.json").read_text()))
    return read


class CpuTrainer(Trainer):
    """`SFTTrainer` with a loss that is fast on CPU, and equal.

    The conversations that DSPy makes begin alike (instructions, field descriptions, demos): that common prefix is run
    once for a batch, and each conversation continues from its keys and values, through which gradients flow. And TRL's
    fused head walks the vocabulary in chunks, which saves memory on a GPU and takes half of a step's time on CPU: here
    the head runs once, on the positions that have a label, which for short completions are few.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        tokens, mask, targets = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:]
        labelled = (targets != IGNORED).any(dim=0).nonzero().squeeze(-1)
        prefix = min(common_prefix(tokens), int(labelled[0]))
        cache = None
        if prefix and len(tokens) > 1 and not self.args.gradient_checkpointing:
            cache = model(input_ids=tokens[:1, :prefix], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(tokens))
        else:
            prefix = 0
        logits = model(
            input_ids=tokens[:, prefix:],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=labelled - prefix,
        ).logits
        kept = targets[:, labelled]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), kept.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = (kept != IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return loss / count.clamp(min=1)


def common_prefix(tokens: torch.Tensor) -> int:
    """How many leading tokens all rows of `tokens` (batch, length) share."""
    differs = (tokens != tokens[:1]).any(dim=0)
    return int(differs.int().argmax()) if bool(differs.any()) else tokens.shape[1]


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Appends one line for each optimizer step."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            line = {"step": state.global_step, "steps": state.max_steps, "epoch": state.epoch, "loss": logs["loss"]}
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")


class _Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Has a checkpoint written every `every_s` seconds, and says when it is whole."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        due = torch.tensor(time.monotonic() - self._last >= self._every_s and state.global_step < state.max_steps)
        if args.world_size > 1:  # all processes save together, when the first one says so
            due = due.to(args.device)
            torch.distributed.broadcast(due, src=0)
        if due:
            self._last = time.monotonic()
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # each process has written its part
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            write_whole(folder / CHECKPOINT_MANIFEST, {"step": state.global_step, "steps": state.max_steps})


def make_trainer(
    kind: type[Trainer],
    job: TrainJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[dict[str, Any]],
) -> Trainer:
    """The trainer of `job`, on conversations as prompt and completion."""
    return kind(
        model=model,
        args=_arguments(job),
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
        peft_config=make_lora_config(job.config, model) if job.config.method == "lora" and job.parent.on is None else None,
        callbacks=[
            _Progress(job.progress_file),
            _Checkpoints(job.config.checkpoint_every_s),
            *([] if job.gpus else [IdleCores(job.threads)]),
        ],
    )


def _arguments(job: TrainJob) -> SFTConfig:
    config, processes = job.config, max(1, job.gpus)
    steps = -(-job.conversations // config.batch_size) * config.epochs
    return SFTConfig(
        output_dir=str(Path(job.folder, CHECKPOINTS)),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=int(config.warmup_ratio * steps),
        per_device_train_batch_size=max(1, config.batch_size // processes),
        max_length=config.max_length,
        completion_only_loss=True,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=job.dtype == "bfloat16",
        use_cpu=job.gpus == 0,
        seed=job.seed,
        logging_steps=1,
        save_strategy="no",  # `_Checkpoints` says when
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=job.gpus > 0,
    )


def make_lora_config(config: TrainConfig, model: PreTrainedModel) -> LoraConfig:
    """What an adapter adds to a model: to all its layers, or to the last ones."""
    targets = "all-linear" if config.layers is None else linear_modules(last_layers(model, config.layers), model)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def write_whole(file: Path, value: Any) -> None:
    """Write a JSON file, which appears when it is whole."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(value, indent=2))
    part.rename(file)
