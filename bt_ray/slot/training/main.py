"""The training process: TRL's `SFTTrainer` on one job's conversations.

    python -m bt_ray.slot.training.main JOB_FILE        (under `torch.distributed.run` on several GPUs)

Reads the job and its conversations, trains on the last message of each alone, appends `{"step", "steps", "epoch",
"loss"}` lines to the progress file, writes checkpoints, and leaves merged safetensors, or the adapter alone, with tokenizer
and chat template in the job's output folder, the manifest last. Only this process imports torch and trl.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bt_ray.slot.canary import make_canary
from bt_ray.slot.file_digest import digest_safetensors
from bt_ray.slot.training.job import TrainJob
from bt_ray.slot.training.layers import freeze_below, last_layers
from bt_ray.slot.training.trainer import CpuTrainer, Trainer, make_trainer, write_whole
from bt_ray.weights import MANIFEST

CANARIES, CANARY_PROMPT, CANARY_COMPLETION = 4, 24, 24
"""Sequences of the canary, and tokens of prompt and of completion in each, at most: it runs at each change of weights."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    frozen_in_bfloat16 = job.gpus and job.config.method == "lora" and job.dtype == "bfloat16"
    dtype = torch.bfloat16 if frozen_in_bfloat16 else torch.float32
    conversations = trainable_conversations(job, tokenizer)
    if not conversations:
        sys.exit(1)
    model_config = AutoConfig.from_pretrained(checkpoint.path, revision=revision)
    kept_in = model_config.dtype or torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, revision=revision, dtype=dtype)
    if job.parent.on is not None:
        model = _with_adapter(model, job)
    elif job.config.layers is not None and job.config.method == "full":
        freeze_below(last_layers(model, job.config.layers), model)
    trainer = make_trainer(Trainer if job.gpus else CpuTrainer, job, model, tokenizer, conversations)
    sequences, completions = canary_sequences(conversations, tokenizer)
    parents = token_logprobs(trainer.model, sequences)
    trainer.train(resume_from_checkpoint=job.checkpoint)
    if trainer.accelerator.is_main_process:
        model = _save_model(trainer.accelerator.unwrap_model(trainer.model), job, kept_in)
        tokenizer.save_pretrained(job.output_dir)
        canary = make_canary(sequences, completions, token_logprobs(model, sequences), parents, job.dtype)
        counts = {
            "conversations": len(conversations),
            "cut_off": count_cut_off(conversations, tokenizer, job.config.max_length),
        }
        _write_manifest(job, {**counts, "canary": canary.to_json()})


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


def count_cut_off(conversations: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
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


def _save_model(model: Any, job: TrainJob, kept_in: torch.dtype) -> torch.nn.Module:
    """Save the trained model, and return it as it is served.

    An adapter is saved as it was trained, a checkpoint in the data type of the one that it came from: then a server can load
    it in place of that.
    """
    if job.adapter:
        model.save_pretrained(job.output_dir)
        Path(job.output_dir, "README.md").unlink(missing_ok=True)  # PEFT's empty form
    else:
        if job.config.method == "lora":
            model = model.merge_and_unload()
        model = model.to(kept_in)
        model.save_pretrained(job.output_dir)
    served: torch.nn.Module = model.to(DTYPES[job.dtype])
    return served


def _write_manifest(job: TrainJob, told: dict[str, Any]) -> None:
    output = Path(job.output_dir)
    identity = {"id": job.weights_id, "parent": job.parent.id, "seed": job.seed, "files": digest_safetensors(output)}
    on = (job.parent.on or job.parent).to_json() if job.adapter else None
    write_whole(output / MANIFEST, {**identity, "on": on, **told, "train": job.config.model_dump()})


if __name__ == "__main__":
    main()
