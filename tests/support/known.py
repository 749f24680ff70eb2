"""A program that needs no model, and optimizers with known outcomes.

The program's skill stands in its instructions, "skill 2": it answers the number `n` right if `n % 10 < skill`, so that its
score on 20 numbers in a row is ten times its skill. This file is a task file too: a test that reads what trials noted copies
it, since they write beside it.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

import bt_ray


class Double(dspy.Signature):  # type: ignore[misc]
    """Double the number."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Known(dspy.Module):  # type: ignore[misc]
    """Doubles numbers without asking anybody."""

    def __init__(self, skill: int = 2) -> None:
        super().__init__()
        self.predict = dspy.Predict(Double)
        set_skill(self, skill)

    def forward(self, question: str) -> dspy.Prediction:
        number = int(question.removeprefix("number "))
        return dspy.Prediction(answer=str(2 * number) if number % 10 < skill_of(self) else "wrong")


class Pair(Known):
    """Two predictors, of which the second is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.second = dspy.Predict(Double)


def skill_of(program: dspy.Module) -> int:
    return int(program.predict.signature.instructions.removeprefix("skill "))


def set_skill(program: dspy.Module, skill: int) -> None:
    program.predict.signature = program.predict.signature.with_instructions(f"skill {skill}")


def exact(example: dspy.Example, prediction: dspy.Prediction) -> bool:
    return bool(example.answer == prediction.answer)


def examples(numbers: range) -> list[dspy.Example]:
    return [dspy.Example(question=f"number {n}", answer=str(2 * n)).with_inputs("question") for n in numbers]


class Becomes(Teleprompter):  # type: ignore[misc]
    """Gives the program the skill that `change` makes of the one it has."""

    def __init__(self, change: Callable[[int], int]) -> None:
        self.change = change

    def compile(self, student: dspy.Module, *, trainset: list[dspy.Example]) -> dspy.Module:
        set_skill(student, self.change(skill_of(student)))
        return student


def skill(value: int) -> Becomes:
    """An optimizer whose result has this skill."""
    return Becomes(lambda _: value)


class Noting(Teleprompter):  # type: ignore[misc]
    """Changes nothing, and adds what it was given to `seen`: examples by their questions, programs by their skill."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def note(self, **given: Any) -> None:
        self.seen.append({name: as_values(value) for name, value in given.items()})


class Told(Noting):
    """Takes all that BetterTogether gives, and an argument of its own."""

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: Any = None,
        valset: list[dspy.Example] | None = None,
        extra: int | None = None,
    ) -> dspy.Module:
        self.note(trainset=trainset, teacher=teacher, valset=valset, extra=extra)
        return student


class OnlyTrainset(Noting):
    """Takes the trainset alone."""

    def compile(self, student: dspy.Module, *, trainset: list[dspy.Example]) -> dspy.Module:
        self.note(trainset=trainset)
        return student


def as_values(given: Any) -> Any:
    if isinstance(given, list):
        return [as_values(item) for item in given]
    if isinstance(given, dspy.Example):
        return given.question
    return skill_of(given) if isinstance(given, dspy.Module) else given


def task(**replaced: Any) -> bt_ray.Task:
    """20 examples to train, and 20 to validate, on which the program as it is has 20 %."""
    settings: dict[str, Any] = {
        "program": Known(),
        "trainset": examples(range(100, 120)),
        "valset": examples(range(20)),
        "metric": exact,
        "optimizers": lambda ctx: {"a": skill(4), "b": skill(6)},
    }
    return bt_ray.Task(**{**settings, **replaced})


class Noted(Told):
    """Notes in a file beside this one what the step was given, and DSPy's settings in it."""

    def __init__(self, prefix: str) -> None:
        super().__init__([])
        self.prefix = prefix

    def note(self, **given: Any) -> None:
        super().note(**given)
        ambient = {name: dspy.settings[name] for name in ("num_threads", "max_errors", "provide_traceback")}
        line = {"prefix": self.prefix, "given": self.seen[-1], **ambient}
        with Path(__file__).with_name("noted.jsonl").open("a") as notes:
            notes.write(json.dumps(line) + "\n")


def noted(**replaced: Any) -> bt_ray.Task:
    return task(optimizers=lambda ctx: {"t": Noted(ctx.prefix), "a": skill(4), "b": skill(6)}, **replaced)


def noted_without_valset() -> bt_ray.Task:
    return noted(valset=None)


def failing_metric(first: int) -> Callable[[dspy.Example, dspy.Prediction], bool]:
    """A metric that raises for this number and those after it."""

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        if int(example.question.removeprefix("number ")) >= first:
            raise KeyError("no such field")
        return exact(example, prediction)

    return metric


def three_fail() -> bt_ray.Task:
    """The metric raises for three examples of the valset, and three of the testset."""
    return task(metric=failing_metric(17), testset=examples(range(10, 20)))


def one_nan() -> bt_ray.Task:
    """The metric gives NaN for one example of the valset and one of the testset, which no program answers right."""

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> float:
        return math.nan if example.question == "number 19" else float(exact(example, prediction))

    return task(metric=metric, testset=examples(range(10, 20)))


def validated_on(first: int) -> bt_ray.Task:
    """The valset has this number and the 19 after it: of the first ten numbers some are answered, of others none."""

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        return exact(example, prediction) and int(example.answer) < 20

    return task(metric=metric, valset=examples(range(first, first + 20)))
