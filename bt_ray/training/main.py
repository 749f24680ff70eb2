"""The training process: TRL's `SFTTrainer` on one job's conversations.

    python -m bt_ray.training.main JOB_FILE        (under `torch.distributed.run` on several GPUs)

Reads the job and its conversations, trains on the last message of each alone, appends `{"step", "steps", "epoch",
"loss"}` lines to the progress file, and leaves merged safetensors with tokenizer and chat template in the job's output
folder, the manifest last. Only this module imports torch and trl.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from bt_ray.training.job import TrainJob
from bt_ray.weights import MANIFEST

IGNORED = -100
"""The label of a token that has no part in the loss."""


def main() -> None:
    job = TrainJob.read(Path(sys.argv[1]))
    torch.manual_seed(job.seed)
    revision = job.parent.revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(job.parent.path, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # On CPU, float32 weights under bf16 autocast train 1.6 times as fast as bf16 weights (SmolLM2-135M, 2 cores).
    # Full fine-tuning in bf16 would lose its small updates, so bf16 is for the frozen weights under an adapter on a GPU.
    dtype = torch.bfloat16 if job.gpus and job.config.method == "lora" else torch.float32
    conversations = trainable_conversations(job, tokenizer)
    if not conversations:
        sys.exit(1)
    model = AutoModelForCausalLM.from_pretrained(job.parent.path, revision=revision, dtype=dtype)
    trainer = (SFTTrainer if job.gpus else CpuTrainer)(
        model=model,
        args=_arguments(job),
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
        peft_config=_lora(job) if job.config.method == "lora" else None,
        callbacks=[_Progress(Path(job.progress_file))],
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        _save(trainer, tokenizer, job, len(conversations))


def trainable_conversations(job: TrainJob, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The job's conversations as prompt and completion, which makes TRL take the loss on the completion only.

    Those whose prompt alone fills `max_length` are left out: they would be cut to nothing to learn. If none remains, the
    refusal file says so.
    """
    longest, kept = 0, []
    for line in Path(job.data_file).read_text().splitlines():
        *prompt, completion = json.loads(line)["messages"]
        tokens = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"])
        longest = max(longest, tokens)
        if tokens < job.config.max_length:
            kept.append({"prompt": prompt, "completion": [completion]})
    left_out = job.conversations - len(kept)
    told = (
        f"{left_out} of {job.conversations} training examples have a prompt of train.max_length = {job.config.max_length} "
        f"tokens or more, so their answers would be cut off. The longest prompt has {longest}: set train.max_length higher."
    )
    if left_out:
        logging.getLogger(__name__).warning(told)
    if not kept:
        job.refusal_file.write_text(f"There is nothing to train on: {told}")
    return kept


def _arguments(job: TrainJob) -> SFTConfig:
    config, processes = job.config, max(1, job.gpus)
    steps = -(-job.conversations // config.batch_size) * config.epochs
    return SFTConfig(
        output_dir=f"{job.output_dir}.trainer",
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=int(config.warmup_ratio * steps),
        per_device_train_batch_size=max(1, config.batch_size // processes),
        max_length=config.max_length,
        completion_only_loss=True,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=True,
        use_cpu=job.gpus == 0,
        seed=job.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=job.gpus > 0,
    )


def _lora(job: TrainJob) -> LoraConfig:
    rank = job.config.lora_rank
    return LoraConfig(
        r=rank,
        lora_alpha=job.config.lora_alpha or 2 * rank,
        lora_dropout=job.config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


class CpuTrainer(SFTTrainer):  # type: ignore[misc]
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


def _save(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, job: TrainJob, conversations: int) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if job.config.method == "lora":
        model = model.merge_and_unload()
    output = Path(job.output_dir)
    model.to(torch.bfloat16).save_pretrained(output, safe_serialization=True)
    tokenizer.save_pretrained(output)
    manifest = {"id": job.weights_id, "parent": job.parent.id, "conversations": conversations, "seed": job.seed}
    manifest["train"] = job.config.model_dump()
    (output / f"{MANIFEST}.part").write_text(json.dumps(manifest, indent=2))
    (output / f"{MANIFEST}.part").rename(output / MANIFEST)


if __name__ == "__main__":
    main()
