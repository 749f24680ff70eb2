"""Each process of a sweep refuses a task that is not the one that the driver made the keys of, and says what differs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT

import bt_ray
from bt_ray.events import Event, StepFinished, TrialWaits

pytestmark = pytest.mark.usefixtures("local_ray")

TASK = """
import random
from pathlib import Path

import dspy
import known
import psutil

SCALE = 2


def exact(example, prediction):
    return float(example.answer == prediction.answer) * SCALE / 2


def note():
    with Path(__file__).with_name("loaded.txt").open("a") as log:
        log.write("loaded\\n")


def elsewhere():
    return psutil.Process().cmdline()[0].startswith("ray::EvaluatingProcess")


def make(**replaced):
    note()
    program = known.Known()
    program.set_lm(dspy.LM("openai/nobody", api_key="none"))
    optimizers = lambda ctx: {"a": known.skill(4), "b": known.skill(6)}
    return known.task(**{"program": program, "metric": exact, "optimizers": optimizers, **replaced})


def build():
    return make(testset=known.examples(range(40, 50)))


def shuffled():
    trainset = known.examples(range(100, 120))
    random.SystemRandom().shuffle(trainset)
    return make(trainset=trainset)


def other_elsewhere():
    return make(valset=known.examples(range(20) if not elsewhere() else range(1, 21)))
"""


class Sweep:
    """A sweep of a task in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "edited_task.py"
        self.file.write_text(TASK)
        shutil.copy(SUPPORT / "known.py", folder)

    def run(self, build: str = "build", *strategies: str, listener: Any = None, **settings: Any) -> bt_ray.SweepResult:
        values = {"strategies": strategies or ("a", "b"), "run_dir": str(self.folder / "run"), **settings}
        return bt_ray.sweep(f"{self.file}:{build}", values, listener=listener)

    def edit_at(self, kind: type[Event], *edits: tuple[str, str]) -> Callable[[Event], None]:
        """A listener that edits the file at the first event of a kind."""
        left = [kind]

        def listen(event: Event) -> None:
            if left and isinstance(event, left[0]):
                left.clear()
                text = self.file.read_text()
                for before, after in edits:
                    assert before in text
                    text = text.replace(before, after)
                self.file.write_text(text)

        return listen

    @property
    def loads(self) -> int:
        return len((self.folder / "loaded.txt").read_text().splitlines())


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def test_a_file_that_is_edited_while_the_sweep_runs_is_refused_by_the_name_of_what_changed(sweep: Sweep) -> None:
    metric = ("example.answer == prediction.answer", "example.answer != prediction.answer")
    optimizer = ("known.skill(6)", "known.skill(8)")
    result = sweep.run(listener=sweep.edit_at(TrialWaits, metric, ("SCALE = 2", "SCALE = 1")))
    for trial in result.trials:
        assert trial.candidates == ()
        assert "TaskError" in (trial.error or "")
        assert "is not here what it was when the sweep started" in (trial.error or "")
        assert "metric (function exact in edited_task.py, value SCALE in edited_task.py)" in (trial.error or "")
    assert sweep.loads == 3, "the driver, and each trial once: no retries"
    undo = [(after, before) for before, after in (metric, ("SCALE = 2", "SCALE = 1"))]
    sweep.edit_at(TrialWaits, *undo)(TrialWaits("a", ""))
    result = sweep.run(listener=sweep.edit_at(TrialWaits, optimizer))
    first, second = result.trials
    assert first.error is None
    assert [candidate.score for candidate in first.candidates] == [20.0, 40.0], "what was edited does not concern it"
    assert "optimizer b" in (second.error or "")


@pytest.mark.parametrize(
    ("build", "settings", "said"),
    [("shuffled", {}, "trainset"), ("other_elsewhere", {"trial": {"processes": 2}}, "valset")],
)
def test_a_build_that_differs_between_processes_is_refused_before_anything_is_scored(
    sweep: Sweep, build: str, settings: dict[str, Any], said: str
) -> None:
    (trial,) = sweep.run(build, "a", **settings).trials
    assert trial.candidates == ()
    assert f"What differs: {said}" in (trial.error or "")


def test_a_testset_that_is_edited_is_not_what_the_best_is_scored_on(sweep: Sweep) -> None:
    with pytest.raises(bt_ray.BtRayError, match="What differs: testset"):
        sweep.run("build", "a", listener=sweep.edit_at(StepFinished, ("range(40, 50)", "range(50, 60)")))
    result = bt_ray.SweepResult.read(sweep.folder / "run" / "result.json")
    assert result.best is not None
    assert (result.best.score, result.test_score) == (40.0, None)
