"""Each process of a sweep refuses a task that is not the one that the driver made the keys of, and says what differs."""

import shutil
import subprocess
import sys
import textwrap
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


def test_a_function_that_is_sent_is_the_same_in_each_process(tmp_path: Path) -> None:
    """Whatever it mentions: sources, names of its module that are attributes too, strings as annotations."""
    code = textwrap.dedent(f"""
        from __future__ import annotations
        import sys
        sys.path.insert(0, {str(SUPPORT)!r})
        import bt_ray, dspy, known

        answer, seen = 42, {{}}

        class Item(dspy.Signature):
            question: str = dspy.InputField()
            item: dict[str, int] = dspy.OutputField()

        class Notes:
            def __init__(self):
                self.seen = []

        class Program(known.Known):
            def __init__(self, given: Notes):
                super().__init__()
                self.notes, self.item = given, dspy.Predict(Item)

            def forward(self, question: str) -> dspy.Prediction:
                self.notes.seen.append(question)
                return super().forward(question)

        def exact(example: dspy.Example, prediction: Item, trace: Notes | None = None):
            return example.answer == prediction.answer

        def build():
            program = Program(Notes())
            program.set_lm(dspy.LM("openai/nobody", api_key="none"))
            of_simba = lambda ctx: {{"a": known.skill(4), "s": dspy.SIMBA(metric=exact, bsize=4)}}
            return known.task(program=program, metric=exact, optimizers=of_simba, testset=known.examples(range(9)))

        def sweep(processes):
            settings = {{"strategies": ["a"], "run_dir": sys.argv[1], "trial": {{"processes": processes}}}}
            return bt_ray.sweep(build, settings)

        if __name__ == "__main__":
            result = sweep(2)
            print(result.trials[0].error, [c.score for c in result.candidates], result.test_score)
    """)
    script = tmp_path / "script.py"
    script.write_text(code)
    for number, command in enumerate(
        (
            [
                "-",
            ],
            [str(script)],
        )
    ):
        done = subprocess.run(
            [sys.executable, *command, str(tmp_path / f"run-{number}")],
            input=code,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "None [40.0, 20.0] 44.44", done.stderr
