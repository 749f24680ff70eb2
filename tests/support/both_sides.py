"""One task walked by DSPy's class and by bt_ray's, to be compared: what was returned, and what its parts saw."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from bt_ray.task.task import StepContext, Task
from bt_ray.trial.lm import ServedLM, assign_lm
from support import known, tasks
from support.known import Told, skill, skill_of
from support.sole_claims import sole_walk

Make = Callable[[list[Any]], Task]
"""Makes the task of one side, whose parts may add what they see to the list."""


@dataclass(frozen=True)
class Result:
    """A returned program as values.

    Attributes:
        returned: The strategy of the candidate that was returned.
        candidates: Strategy, score and skill of each, in the order of `candidate_programs`.
        failed: `flag_compilation_error_occurred`.
    """

    returned: str
    candidates: list[tuple[str, float | None, int]]
    failed: bool


@dataclass(frozen=True)
class Side:
    """What one side did."""

    program: dspy.Module
    seen: list[Any]

    @property
    def result(self) -> Result:
        candidates = self.program.candidate_programs
        (returned,) = [candidate["strategy"] for candidate in candidates if candidate["program"] is self.program]
        listed = [(c["strategy"], c["score"], skill_of(c["program"])) for c in candidates]
        return Result(returned, listed, self.program.flag_compilation_error_occurred)


def by_dspy(task: Task, lm: ServedLM, strategy: str, *, seed: int = 0, **settings: Any) -> dspy.Module:
    """As a user of DSPy would write it."""
    assign_lm(task.program, lm)
    optimizers = task.optimizers(StepContext("", 0, Path("unused"), lm)) if task.optimizers else {}
    optimizer = dspy.BetterTogether(metric=task.metric, **optimizers)
    given = {"trainset": task.trainset, "valset": task.valset, "teacher": task.teacher, "seed": seed, "strategy": strategy}
    return optimizer.compile(task.program, optimizer_compile_args=task.optimizer_compile_args, **given, **settings)


def by_bt_ray(task: Task, lm: ServedLM, strategy: str, **settings: Any) -> dspy.Module:
    return sole_walk(task, lm, strategy, **settings).program


def both(lm: ServedLM, strategy: str, make: Make, **settings: Any) -> tuple[Side, Side]:
    """DSPy's side and bt_ray's, which returned the same and saw the same."""
    sides = []
    for walk in (by_dspy, by_bt_ray):
        seen: list[Any] = []
        sides.append(Side(walk(make(seen), lm, strategy, **{"num_threads": 1, **settings}), seen))
    theirs, ours = sides
    assert ours.result == theirs.result
    assert ours.seen == theirs.seen
    return theirs, ours


def skills(**optimizers: int) -> Make:
    """Optimizers whose results have these skills, and `bad`, which fails."""
    return lambda seen: known.task(
        optimizers=lambda ctx: {**{key: skill(value) for key, value in optimizers.items()}, "bad": tasks.Failing()}
    )


def told(**task: Any) -> Make:
    """An optimizer `t` that notes what it is given, and changes nothing; `a` and `b` change the program."""
    return lambda seen: known.task(
        **{"optimizers": lambda ctx: {"t": Told(seen), "u": Told(seen), "a": skill(6), "b": skill(3)}, **task}
    )
