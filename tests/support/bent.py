"""A program whose skill optimizers can change in ways that JSON keeps, and in ways that it does not. It asks nobody.

A task file, as `known` is, whose parts it uses.
"""

from types import MethodType
from typing import Any

import dspy
import known
from dspy.teleprompt.teleprompt import Teleprompter

import bt_ray


class Bent(known.Known):
    """Right for `n % 10` below the skill in its instructions, and whatever else was added to it."""

    def forward(self, question: str) -> dspy.Prediction:
        added = (self.predict.config.get("top_k", 0), self.predict.lm.kwargs.get("top_k", 0), getattr(self, "bonus", 0))
        number = int(question.removeprefix("number "))
        right = number % 10 < known.skill_of(self) + sum(added) + len(self.predict.demos)
        return dspy.Prediction(answer=str(2 * number) if right else "wrong")


class Change(Teleprompter):  # type: ignore[misc]
    """Does something to the program."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def compile(self, student: dspy.Module, *, trainset: list[dspy.Example]) -> dspy.Module:
        return self.change(student) or student


def knows_all(self: Bent, question: str) -> dspy.Prediction:
    return dspy.Prediction(answer=str(2 * int(question.removeprefix("number "))))


def set_attribute(program: Bent) -> None:
    program.bonus = 8


def set_forward(program: Bent) -> None:
    program.forward = MethodType(knows_all, program)


def set_config(program: Bent) -> None:
    program.predict.config["top_k"] = 5


def set_unkept_config(program: Bent) -> None:
    program.predict.config |= {"top_k": 8, "response_format": known.Double}


def set_lm(program: Bent) -> None:
    program.predict.lm = program.predict.lm.copy(top_k=3)


def set_demos(program: Bent) -> None:
    program.predict.demos = [{"question": f"number {n}", "answer": ("as", "a", "tuple")} for n in range(8)]


def make_another(program: Bent) -> dspy.Module:
    return known.Known(skill=10)


CHANGES = {
    "attribute": set_attribute,
    "forward": set_forward,
    "config": set_config,
    "unkept": set_unkept_config,
    "lm": set_lm,
    "demos": set_demos,
    "another": make_another,
}


def build() -> bt_ray.Task:
    """20 % as it is; what is kept gives 40 to 70 %, and what is not 100 %."""
    program = Bent()
    program.set_lm(dspy.LM("openai/nobody", api_key="none"))

    def optimizers(ctx: bt_ray.StepContext) -> dict[str, Teleprompter]:
        return {"honest": known.skill(4), **{name: Change(change) for name, change in CHANGES.items()}}

    return known.task(program=program, optimizers=optimizers)
