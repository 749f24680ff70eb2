"""What an evaluation and a fine-tune will take on this machine's CPU, said before they begin.

Both are nearly all products of matrices, so their time follows from the tokens, the model's parameters and a measured
product: 2 operations for a parameter and token forwards, backwards 2 for the gradients of the activations and 2 for those
of the parameters (Kaplan et al., "Scaling Laws for Neural Language Models", section 2.1). Rough on purpose: it tells minutes
from hours.
"""

import itertools
import logging
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from bt_ray.errors import amount
from bt_ray.settings.config import ServerConfig, SweepConfig
from bt_ray.slot.arithmetic import Arithmetic, cpu_arithmetic
from bt_ray.slot.serving.checkpoint import TIED, checkpoint_folder, read_layout
from bt_ray.task.task import Task
from bt_ray.weights import Weights, model_name

REST_GFLOPS = 200.0
"""GFLOP/s of the same work if products took no time: attention, copies and norms bound it. Measured: 150 to 300."""
SERVED = 0.5
"""The part of a training's speed that vLLM reaches with short prompts and answers. Measured in the demo: 0.34 to 0.52."""
FORWARD, ACTIVATIONS, PARAMETERS = 2, 2, 2
"""Operations for each parameter and token: forwards, and backwards for either kind of gradient."""
ADAPTER = 0.6
"""Those of an adapter, for each parameter of the model that it is on."""
LOOKED_AT = 16
"""Examples whose prompts are counted."""
SERVER_GIB, TRAINER_GIB = 2.5, 1.5
"""What a vLLM server (with 1 GiB for keys and values) and a training process hold beside the model."""
SLOW_S = 2 * 3600
"""Seconds of a fine-tune from which on it is said to be slow."""
EMBEDDING, LAYER = "embed_tokens", re.compile(r"\.layers\.(\d+)\.")
GIB = 2**30
logger = logging.getLogger(__name__)
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Model:
    """The parameters of a model.

    Attributes:
        body: Those that each token goes through.
        head: Those that make a token's log-probabilities.
        layers: The number of layers.
    """

    body: int
    head: int
    layers: int

    @property
    def all(self) -> int:
        return self.body + self.head


@dataclass(frozen=True)
class CpuCost:
    """What a sweep takes on this machine.

    Attributes:
        arithmetic: The processor's.
        evaluation_s: Seconds of one evaluation on the valset, on one server.
        training_s: Seconds of one fine-tune on the trainset, in one slot.
        needed_gib: Memory of all servers and as many trainings at once.
        free_gib: Memory that is free now.
    """

    arithmetic: Arithmetic
    evaluation_s: float
    training_s: float
    needed_gib: float
    free_gib: float


def describe_here(config: SweepConfig, task: Task, bases: Collection[Weights], address: str | None) -> list[str]:
    """What to say of this machine before a sweep begins; nothing where its servers are elsewhere.

    Args:
        config: The sweep's settings.
        task: Its task.
        bases: The base models that it serves.
        address: Of the cluster that was asked for.
    """
    if address is not None or os.environ.get("RAY_ADDRESS") or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return []
    cost = cost_here(config, task, bases)
    return describe_cost(cost, config.student_server) if cost is not None else []


def cost_here(config: SweepConfig, task: Task, bases: Collection[Weights]) -> CpuCost | None:
    """What a sweep takes, if its servers are this machine's CPU and its model is at hand.

    Args:
        config: Its settings.
        task: Its task.
        bases: The base models that it serves.
    """
    server = config.student_server
    student = next((base for base in bases if base.model == model_name(config.model or "")), None)
    if student is None or server.gpus or server.command or (folder := checkpoint_folder(student)) is None:
        return None
    try:
        prompts, answer = read_prompts(folder, task)
        return estimate_cost(read_model(folder), cpu_arithmetic(server.env), config, task, prompts, answer)
    except Exception as error:  # no sweep fails for an estimate: a task's own adapter or field may do anything
        logger.info("No estimate of this machine's times: %s: %s", type(error).__name__, error)
        return None


def read_model(folder: Path) -> Model:
    """The parameters of a checkpoint, from its files' headers.

    Raises:
        StorageError: It has no whole safetensors.
    """
    sizes = {name: math.prod(shape) for name, (_, shape) in read_layout(folder).items()}
    embedding = sum(size for name, size in sizes.items() if EMBEDDING in name)
    head = sizes.get(TIED, embedding)
    layers = {match[1] for name in sizes if (match := LAYER.search(name))}
    return Model(sum(sizes.values()) - embedding - sizes.get(TIED, 0), head, max(1, len(layers)))


def estimate_cost(
    model: Model, arithmetic: Arithmetic, config: SweepConfig, task: Task, prompts: Sequence[Sequence[int]], answer: int
) -> CpuCost:
    """What a sweep takes on this machine.

    Args:
        model: The student's.
        arithmetic: The processor's.
        config: The sweep's settings.
        task: The task.
        prompts: Token ids of some prompts of the program, each of another example.
        answer: Tokens of an answer.
    """
    server, train = config.student_server, config.train
    speed = 1e9 * server.compute_threads / (1 / arithmetic.gflops + 1 / REST_GFLOPS)
    shared = count_shared(prompts)
    own = sum(len(prompt) for prompt in prompts) / len(prompts) - shared
    evaluated = len(task.validation_examples(config.valset_ratio)) * len(task.program.predictors())
    request = FORWARD * ((own + answer) * model.body + answer * model.head)
    learnt = len(task.trainset) * len(task.program.predictors()) * train.epochs
    tokens = learnt * (own + answer) + learnt / train.batch_size * shared
    backward = ACTIVATIONS + (PARAMETERS if train.method == "full" else ADAPTER)
    operations = FORWARD + backward * min(train.layers or model.layers, model.layers) / model.layers
    of_weights = {"lora": 1, "full": 4}[train.method]
    bytes_served = 4 if arithmetic.dtype == "float32" else 2
    servers = SERVER_GIB * server.count + model.all * bytes_served * server.count / GIB
    trainings = TRAINER_GIB * server.count + model.all * 4 * of_weights * server.count / GIB
    return CpuCost(
        arithmetic,
        evaluated * request / (speed * SERVED),
        (operations * tokens * model.body + (FORWARD + ACTIVATIONS) * learnt * answer * model.head) / speed,
        servers + trainings,
        free_gib(),
    )


def read_prompts(folder: Path, task: Task) -> tuple[list[list[int]], int]:
    """Token ids of some of the program's prompts, and the tokens of an answer, as DSPy's adapter writes them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    prompts, answers = [], []
    for predictor in task.program.predictors():
        signature = predictor.signature
        for example in task.trainset[:LOOKED_AT]:
            inputs = {name: example.get(name, "") for name in signature.input_fields}
            messages = adapter.format(signature, predictor.demos, inputs)
            prompts.append(tokenizer.encode("".join(_text(message["content"]) for message in messages)).ids)
            outputs = " ".join(f"[[ ## {name} ## ]] {example.get(name, '')}" for name in signature.output_fields)
            answers.append(len(tokenizer.encode(outputs + " [[ ## completed ## ]]").ids))
    return prompts, round(sum(answers) / len(answers))


def count_shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    alike = zip(*prompts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, alike))


def _text(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def describe_cost(cost: CpuCost, server: ServerConfig) -> list[str]:
    """The lines of a check: the arithmetic, the times, and what is too small."""
    lines = [
        f"machine    computes in {cost.arithmetic}",
        f"time       about {in_words(cost.evaluation_s)} for an evaluation on the valset, {in_words(cost.training_s)} for a "
        f"fine-tune, with {amount(server.compute_threads, 'thread')} each",
    ]
    if cost.training_s > SLOW_S:
        lines.append(
            "warning: a fine-tune takes hours here. Lower train.epochs, or take fewer examples, a smaller model or a GPU."
        )
    if 0 < cost.free_gib < cost.needed_gib:
        lines.append(
            f"warning: {amount(server.count, 'server')} and as many trainings need about {cost.needed_gib:.0f} GiB; "
            f"{cost.free_gib:.0f} GiB are free. Lower server.count, or take a smaller model."
        )
    return lines


def in_words(seconds: float) -> str:
    """A rough time: `"40 s"`, `"5 min"`, `"3 h"`."""
    if seconds < 90:
        return f"{max(1, round(seconds, -1 if seconds >= 20 else 0)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.0f} h"


def free_gib() -> float:
    """GiB of memory that new processes can have, 0 where the system does not say."""
    try:
        lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    except (OSError, ValueError):
        return 0.0
    return int(lines.get("MemAvailable", "0 kB").split()[0]) / 2**20
