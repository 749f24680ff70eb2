"""Measure the trainer: seconds of an optimizer step, tokens per second, memory; the ways to save work beside each other.

    python scripts/bench_training.py --model models/SmolLM2-135M-Instruct                       # on CPU
    python scripts/bench_training.py --model models/SmolLM2-135M-Instruct --gpus 1 --shape own 1.7b 8b

Two kinds of data, as DSPy's `BootstrapFinetune` makes them. `alike`: the same instructions and demos before a short question
(the demo's task), answered in a few words. `different`: a document of its own before each question, of 50 to 1,500 words,
and an answer that reasons. A shape other than the model's own has random weights, which take as long as others.

`plain` is TRL's trainer, with conversations in a random order; `prefix` runs once what the conversations of a batch begin
with; `by length` puts conversations of about the same length together, where that saves much padding. bt_ray trains by
length, on CPU with the prefix too. Tokens are those of the conversations, padding not counted.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTTrainer

from bt_ray.settings.config import ServerConfig, TrainConfig
from bt_ray.slot.training.job import TrainJob, training_dtype
from bt_ray.slot.training.main import trainable_conversations
from bt_ray.slot.training.trainer import CpuTrainer, Trainer, make_trainer
from bt_ray.weights import Weights

SHAPES: Mapping[str, Mapping[str, int]] = {
    "own": {},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


class InRandomOrder:
    """Of a trainer, that its batches are what the order gives."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SFTTrainer._get_train_sampler(self, train_dataset)


class Plain(InRandomOrder, Trainer):
    pass


class Prefix(InRandomOrder, CpuTrainer):
    pass


WAYS = {"plain": Plain, "plain by length": Trainer, "prefix": Prefix, "prefix by length": CpuTrainer}
WARM_UP, SEED = 3, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="its tokenizer, and its weights where the shape is its own"
    )
    parser.add_argument("--gpus", type=int, default=0, choices=[0, 1])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["own"], help="of the model")
    parser.add_argument(
        "--data", nargs="+", help="alike, different, or a file of conversations", default=["alike", "different"]
    )
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=12, help=f"of which the first {WARM_UP} do not count")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.gpus else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; PyTorch {torch.__version__}; {options.method}; medians of {options.steps - WARM_UP} steps")
    print("shape  data         batch  way              s / step  tokens / s  padding  peak GiB  first loss", flush=True)
    for shape, data, batch_size, way in product(options.shape, options.data, options.batch_size, options.way):
        config = TrainConfig(method=options.method, batch_size=batch_size, dtype=options.dtype)
        try:
            found = measured(options.model, shape, conversations(data), config, way, options.gpus, options.steps)
        except torch.OutOfMemoryError:
            found = "out of memory"
        print(f"{shape:<6} {Path(data).stem:<12} {batch_size:5}  {way:<16} {found}", flush=True)


def conversations(data: str) -> list[dict[str, Any]]:
    if Path(data).suffix:
        return [json.loads(line) for line in Path(data).read_text().splitlines()]
    return list({"alike": alike, "different": different}[data]())


def alike(count: int = 200) -> Iterator[dict[str, Any]]:
    import dspy

    inputs = [f"{side}_{what}" for side in ("petal", "sepal") for what in ("length", "width")]
    signature = dspy.Signature(f"{', '.join(inputs)} -> answer", "Given the dimensions in cm, predict the iris species.")
    draw = random.Random(SEED)

    def flower() -> dict[str, str]:
        return {**{name: f"{draw.uniform(0.1, 8):.1f}" for name in inputs}, "answer": draw.choice(["setosa", "virginica"])}

    demos = [dspy.Example(flower()) for _ in range(3)]
    for _ in range(count):
        one = flower()
        yield formatted(signature, demos, {name: one[name] for name in inputs}, {"answer": one["answer"]})


def different(count: int = 200) -> Iterator[dict[str, Any]]:
    import dspy

    signature = dspy.Signature("context, question -> reasoning, answer", "Answer the question from the context.")
    draw = random.Random(SEED)
    words = [
        "river",
        "stone",
        "green",
        "engine",
        "between",
        "seven",
        "often",
        "carries",
        "north",
        "letter",
        "small",
        "under",
    ]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    for _ in range(count):
        inputs = {"context": text(50, 1500), "question": text(8, 20)}
        yield formatted(signature, [], inputs, {"reasoning": text(20, 80), "answer": text(1, 5)})


def formatted(signature: Any, demos: Sequence[Any], inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    import dspy

    made: dict[str, Any] = dspy.ChatAdapter().format_finetune_data(signature, demos, inputs, outputs)
    return made


@dataclass
class Steps(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ended."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())

    def on_log(self, *_: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def measured(
    path: Path, shape: str, data: Sequence[Mapping[str, Any]], config: TrainConfig, way: str, gpus: int, steps: int
) -> str:
    """A row of the table: what some steps of a training took."""
    with tempfile.TemporaryDirectory() as folder:
        parent = Weights("base", str(path.resolve()), "base")
        dtype = training_dtype(ServerConfig(gpus=gpus), config)
        threads = torch.get_num_threads()
        job = TrainJob(parent, "bench", folder, folder, False, None, len(data), config, dtype, SEED, gpus, threads)
        job.data_file.write_text("".join(json.dumps(conversation) + "\n" for conversation in data))
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        torch.manual_seed(SEED)
        model = model_of(path, shape, config, gpus)
        trainer = make_trainer(WAYS[way], job, model, tokenizer, trainable_conversations(job, tokenizer))
        trainer.args.max_steps = steps
        watch, tokens, padded = Steps(), [], []
        collate = trainer.data_collator

        def counted(rows: list[dict[str, Any]]) -> Any:
            batch = collate(rows)
            tokens.append(int(batch["attention_mask"].sum()))
            padded.append(batch["attention_mask"].numel())
            return batch

        trainer.data_collator = counted
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        if gpus:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    took = [later - sooner for sooner, later in zip(watch.ends, watch.ends[1:], strict=False)][WARM_UP - 1 :]
    step_s = statistics.median(took)
    speed = sum(tokens[WARM_UP:steps]) / sum(took)
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:8.1f}" if gpus else f"{'-':>8}"
    padding = 1 - sum(tokens) / sum(padded)
    return f"{step_s:8.3f}  {speed:10.0f}  {padding:7.0%}  {peak}  {watch.losses[0]:10.3f}"


def model_of(path: Path, shape: str, config: TrainConfig, gpus: int) -> Any:
    """The model as `bt_ray.slot.training.main` has it; with random weights if they are missing or of another shape."""
    frozen_in_bfloat16 = gpus and config.method == "lora" and config.dtype != "float32"
    dtype = torch.bfloat16 if frozen_in_bfloat16 else torch.float32
    sizes = dict(SHAPES[shape])
    if not sizes and list(path.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if sizes:
        heads = sizes["num_attention_heads"]
        sizes = {"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads, **sizes}
    with torch.device("cuda" if gpus else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **sizes), dtype=dtype)


if __name__ == "__main__":
    main()
