"""The task of `said`, whose program asks again and again while there is a file `hold` beside this one.

A test has a copy of both files, and so decides how long requests are under way.
"""

import contextlib
import itertools
from pathlib import Path
from typing import Any

import dspy
import said
from dspy.utils.exceptions import AdapterParseError

import bt_ray

HOLD = Path(__file__).with_name("hold")


class SaidWhileHeld(dspy.Module):
    def __init__(self, say: dspy.Module) -> None:
        super().__init__()
        self.say = say

    def forward(self, q: str) -> Any:
        for number in itertools.count():
            if not HOLD.exists():
                break
            with contextlib.suppress(AdapterParseError):  # a model that was not trained says anything
                self.say(q=f"{q} {number}")
        return self.say(q=q)


def build() -> bt_ray.Task:
    task = said.build()
    program = SaidWhileHeld(task.program)
    teacher = bt_ray.gold_label_teacher(program, task.trainset)
    return bt_ray.Task(
        program=program,
        trainset=task.trainset,
        valset=task.valset,
        metric=said.same,
        optimizers=task.optimizers,
        optimizer_compile_args={"w": {"teacher": teacher}},
    )
