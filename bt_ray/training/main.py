"""The training process: TRL's `SFTTrainer` on one job's conversations.

    python -m bt_ray.training.main JOB_FILE        (under `torch.distributed.run` on several GPUs)

Reads the job and its conversations, trains on the last message of each alone, appends `{"step", "steps", "epoch",
"loss"}` lines to the progress file, writes checkpoints, and leaves merged safetensors, or the adapter alone, with tokenizer
and chat template in the job's output folder, the manifest last. Only this module imports torch and trl.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from bt_ray.serving.canary import make_canary
from bt_ray.training.batches import BatchesByLength, worth_sorting
from bt_ray.training.job import CHECKPOINT_MANIFEST, CHECKPOINTS, TrainJob
from bt_ray.weights import MANIFEST, file_digests

IGNORED = -100
"""The label of a token that has no part in the loss."""
CANARIES, CANARY_PROMPT, CANARY_COMPLETION = 4, 24, 24
"""Sequences of the canary, and tokens of prompt and of completion in each, at most: it runs at each change of weights."""
TENSOR, MAPPING = "__tensor__", "__mapping__"


def main() -> None:
    job = TrainJob.read(Path(sys.argv[1]))
    torch.manual_seed(job.seed)
    checkpoint = job.parent.on or job.parent
    revision = checkpoint.revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # On CPU, float32 weights under bf16 autocast train 1.6 times as fast as bf16 weights (SmolLM2-135M, 2 cores).
    # Full fine-tuning in bf16 would lose its small updates, so bf16 is for the frozen weights under an adapter on a GPU.
    dtype = torch.bfloat16 if job.gpus and job.config.method == "lora" else torch.float32
    conversations = trainable_conversations(job, tokenizer)
    if not conversations:
        sys.exit(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, revision=revision, dtype=dtype)
    if job.parent.on is not None:
        model = _with_adapter(model, job)
    trainer = make_trainer(job, model, tokenizer, conversations)
    sequences, completions = canary_sequences(conversations, tokenizer)
    parents = token_logprobs(trainer.model, sequences)
    trainer.train(resume_from_checkpoint=job.checkpoint)
    if trainer.accelerator.is_main_process:
        model = _save_model(trainer.accelerator.unwrap_model(trainer.model), job)
        tokenizer.save_pretrained(job.output_dir)
        canary = make_canary(sequences, completions, token_logprobs(model, sequences), parents)
        counts = {"conversations": len(conversations), "cut_off": cut_off(conversations, tokenizer, job.config.max_length)}
        _write_manifest(job, {**counts, "canary": canary.to_json()})


def make_trainer(
    job: TrainJob,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[dict[str, Any]],
    kind: "type[Trainer] | None" = None,
) -> "Trainer":
    """The trainer of `job` on what `trainable_conversations` gave; `kind` is for measurements."""
    return (kind or (Trainer if job.gpus else CpuTrainer))(
        model=model,
        args=_arguments(job),
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
        peft_config=_lora(job) if job.config.method == "lora" and job.parent.on is None else None,
        callbacks=[_Progress(job.progress_file), _Checkpoints(job.config.checkpoint_every_s)],
    )


def trainable_conversations(job: TrainJob, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The job's conversations as prompt and completion, which makes TRL take the loss on the completion only.

    Those whose prompt alone fills `max_length` are left out: they would be cut to nothing to learn. If none remains, the
    refusal file says so.
    """
    longest, kept = 0, []
    for line in job.data_file.read_text().splitlines():
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


def cut_off(conversations: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """How many conversations are longer than `max_length` tokens, so that the end of their answer was not learnt."""
    wholes = [[*conversation["prompt"], *conversation["completion"]] for conversation in conversations]
    lengths = [len(tokenizer.apply_chat_template(whole, tokenize=True)["input_ids"]) for whole in wholes]
    return sum(length > max_length for length in lengths)


def canary_sequences(
    conversations: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[int]]:
    """Token sequences that tell these weights from others, and where in each the part begins that is learnt.

    They are ends of prompts with their completions, of different completions as far as there are: a sibling that learnt
    other labels answers them otherwise.
    """
    distinct = {conversation["completion"][0]["content"]: conversation for conversation in reversed(conversations)}
    chosen = [*distinct.values(), *conversations][:CANARIES]
    sequences, completions = [], []
    for conversation in chosen:
        prompt = tokenizer.apply_chat_template(conversation["prompt"], add_generation_prompt=True, tokenize=True)[
            "input_ids"
        ]
        whole = tokenizer.apply_chat_template([*conversation["prompt"], *conversation["completion"]], tokenize=True)[
            "input_ids"
        ]
        shown = list(prompt)[-CANARY_PROMPT:]
        sequences.append(shown + list(whole)[len(prompt) :][:CANARY_COMPLETION])
        completions.append(len(shown))
    return sequences, completions


def token_logprobs(model: torch.nn.Module, sequences: list[list[int]]) -> list[list[float]]:
    """The log-probability of each token but the first, given those before it."""
    rows = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for tokens in sequences:
            ids = torch.tensor([tokens], device=next(model.parameters()).device)
            logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
            rows.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    model.train(training)
    return rows


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
        bf16=True,
        use_cpu=job.gpus == 0,
        seed=job.seed,
        logging_steps=1,
        save_strategy="no",  # `_Checkpoints` says when
        save_total_limit=2,
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


def _with_adapter(model: torch.nn.Module, job: TrainJob) -> PeftModel:
    """The model with the adapter that is trained on; its rank and alpha stay what they are."""
    adapted = PeftModel.from_pretrained(model, job.parent.path, is_trainable=True)
    rank = adapted.peft_config["default"].r
    if rank != job.config.lora_rank:
        job.refusal_file.write_text(
            f"The adapter {job.parent.id}, which is to be trained on, has rank {rank}, and train.lora_rank is "
            f"{job.config.lora_rank}: with adapters, each fine-tune of a strategy has the same rank."
        )
        sys.exit(1)
    return adapted


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


def _save_model(model: Any, job: TrainJob) -> torch.nn.Module:
    """Save the trained model: the adapter as it was trained, or one checkpoint in bfloat16. Returns it as it is served."""
    if job.adapter:
        model.save_pretrained(job.output_dir)
        Path(job.output_dir, "README.md").unlink(missing_ok=True)  # PEFT's empty form
        served: torch.nn.Module = model.to(torch.bfloat16)
        return served
    if job.config.method == "lora":
        model = model.merge_and_unload()
    merged: torch.nn.Module = model.to(torch.bfloat16)
    merged.save_pretrained(job.output_dir)
    return merged


def _write_manifest(job: TrainJob, told: dict[str, Any]) -> None:
    output = Path(job.output_dir)
    identity = {"id": job.weights_id, "parent": job.parent.id, "seed": job.seed, "files": file_digests(output)}
    on = (job.parent.on or job.parent).to_json() if job.adapter else None
    write_whole(output / MANIFEST, {**identity, "on": on, **told, "train": job.config.model_dump()})


def write_whole(file: Path, value: Any) -> None:
    """Write a JSON file, which appears when it is whole."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(value, indent=2))
    part.rename(file)


if __name__ == "__main__":
    main()
