"""Tasks whose programs have several predictors, models and teachers. Each test has a copy of this file beside its models."""

from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt import BootstrapFinetune
from tasks import Demos, Double, double, exact

import bt_ray

HERE = Path(__file__).parent


def other() -> str:
    """A second model, which the test wrote beside this file."""
    return str(HERE / "other")


def doubling(**lm: Any) -> dspy.Module:
    """A program with the second model."""
    program = dspy.Predict(Double)
    program.set_lm(bt_ray.served(other(), **lm))
    return program


def taught_by_another_model() -> bt_ray.Task:
    """`w` trains on what a larger model that the pool serves gets right."""
    return double(teacher=doubling(temperature=0), optimizer_compile_args={})


def taught_by_several() -> bt_ray.Task:
    """By another model, and by the student itself."""
    return double(
        teacher=[doubling(temperature=0), dspy.Predict(Double)],
        optimizers=lambda ctx: {"w": BootstrapFinetune(metric=exact)},
        optimizer_compile_args={},
    )


class Both(dspy.Module):
    """Two predictors, one with a model of its own: the program is right where the second is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = doubling(max_tokens=50)
        self.second = dspy.Predict(Double)

    def forward(self, question: str) -> dspy.Prediction:
        return self.second(question=f"{self.first(question=question).answer} {question}")


def two_models() -> bt_ray.Task:
    return double(
        program=Both(),
        optimizers=lambda ctx: {"p": Demos(), "w": BootstrapFinetune(metric=lambda *_: True, multitask=False)},
        optimizer_compile_args={},
    )


class Pair(dspy.Module):
    """Two predictors with the sweep's model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(Double)
        self.second = dspy.Predict(Double)

    def forward(self, question: str) -> dspy.Prediction:
        self.first(question=question)
        return self.second(question=f"again: {question}")  # its own data, else the second fine-tune may be the first


def one_model_for_each() -> bt_ray.Task:
    """Each predictor of one LM is fine-tuned into a model of its own."""
    return double(
        program=Pair(),
        optimizers=lambda ctx: {"w": BootstrapFinetune(metric=lambda *_: True, multitask=False)},
        optimizer_compile_args={},
    )


def one_model_for_all() -> bt_ray.Task:
    return double(
        program=Pair(),
        optimizers=lambda ctx: {"w": BootstrapFinetune(metric=lambda *_: True)},
        optimizer_compile_args={},
    )


def self_taught(program: dspy.Module) -> bt_ray.Task:
    """A program that learns from what it gets right itself."""
    return double(
        program=program,
        optimizers=lambda ctx: {"p": Demos(), "w": BootstrapFinetune(metric=exact)},
        optimizer_compile_args={},
    )


def chain_of_thought() -> bt_ray.Task:
    return self_taught(dspy.ChainOfThought(Double))


class Inner(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [dspy.ChainOfThought(Double), dspy.Predict(Double)]

    def forward(self, question: str) -> dspy.Prediction:
        self.steps[0](question=question)
        return self.steps[1](question=question)


class Outer(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = {"one": Inner()}

    def forward(self, question: str) -> dspy.Prediction:
        return self.inner["one"](question=question)


def nested() -> bt_ray.Task:
    return self_taught(Outer())


def react() -> bt_ray.Task:
    def double_it(value: int) -> int:
        (HERE / "tool.txt").open("a").write(f"{value}\n")
        return 2 * value

    return self_taught(dspy.ReAct(Double, tools=[dspy.Tool(double_it, name="double")], max_iters=3))
