"""What counts as another task than the driver's, and how it is told."""

import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import dspy
import pytest
from conftest import ROOT, SUPPORT
from support.planned import BUILD, HEAD, METRIC, PROGRAM, alone

from bt_ray.driver.check import check_sweep
from bt_ray.errors import TaskError
from bt_ray.settings.config import make_config
from bt_ray.task.fingerprint import find_places, keys
from bt_ray.task.task import load_task
from bt_ray.trial.task_check import refuse_other_task, refuse_other_testset

TASK = HEAD + PROGRAM + METRIC + BUILD


def check(theirs: str, ours: str, *prefixes: str, driver: Mapping[str, object] | None = None) -> None:
    """Check the task `ours` in one folder against the driver's in another, which has DSPy's settings `driver`."""
    with alone() as folder, alone() as other:
        for place, text in ((folder, theirs), (other, ours)):
            (place / "task.py").write_text(text)
        config = make_config({"task": f"{folder}/task.py:build", "strategies": ["p", "w"]})
        with dspy.context(**(driver or {})):
            expected = check_sweep(config, None).first.keys
        source = f"{other}/task.py:build"
        refuse_other_task(load_task(source, {}), source, config, None, expected, prefixes, find_places(config.task))


def refused(theirs: str, ours: str, *prefixes: str, driver: Mapping[str, object] | None = None) -> str:
    with pytest.raises(TaskError) as caught:
        check(theirs, ours, *prefixes, driver=driver)
    return str(caught.value)


def test_the_same_task_elsewhere_with_other_comments_passes() -> None:
    check(TASK, TASK.replace("def metric", "# What counts.\ndef metric"), "p", "w")


def test_what_differs_is_told_by_its_name() -> None:
    said = refused(TASK, TASK.replace("== prediction", "!= prediction"))
    assert "What differs: metric (function metric in task.py)" in said
    assert "finished steps that the change does not concern are kept" in said
    assert "trainset" in refused(TASK, TASK.replace("range(20)", "range(21)"))


def test_what_no_step_of_the_process_depends_on_may_differ() -> None:
    edited = TASK.replace("num_candidate_programs=2", "num_candidate_programs=3")
    check(TASK, edited)
    check(TASK, edited, "w")
    assert "optimizer p" in refused(TASK, edited, "p")


def test_settings_of_dspy_that_the_driver_alone_has_are_told() -> None:
    said = refused(TASK, TASK, driver={"adapter": dspy.JSONAdapter()})
    assert "settings of DSPy (" in said
    assert "setting dspy.settings.adapter" in said
    assert "dspy.configure outside of the task's file" in said


@pytest.mark.parametrize(("package", "said"), [("vllm", ""), ("trl", ""), ("dspy", "versions (package dspy)")])
def test_what_servers_run_need_not_be_where_a_trial_is(package: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, asked = keys.distribution_version, count()
    monkeypatch.setattr(keys, "distribution_version", lambda name: f"{next(asked)}" if name == package else installed(name))
    if said:
        assert said in refused(TASK, TASK, "p", "w")
    else:
        check(TASK, TASK, "p", "w")


def test_a_testset_is_told() -> None:
    with pytest.raises(TaskError, match="What differs: testset"):
        refuse_other_testset("task.py:build", [dspy.Example(a=1)], keys.digest([dspy.Example(a=2)]))
    refuse_other_testset("task.py:build", [dspy.Example(a=1)], keys.digest([dspy.Example(a=1)]))


SENT = """
from __future__ import annotations

import sys

import dspy
import known
from dspy.teleprompt import SIMBA
from ray import cloudpickle

from bt_ray.settings.config import make_config
from bt_ray.task.fingerprint import find_places
from bt_ray.driver.check import check_sweep

answer, notes, trace = 42, {}, []  # names that code has as attributes and arguments


class Item(dspy.Signature):
    question: str = dspy.InputField()
    item: dict[str, int] = dspy.OutputField()


class Notes:
    def __init__(self):
        self.seen: list[Item] = []


class Unsent:
    pass


class Program(known.Known):
    notes: Notes

    def __init__(self, notes: Notes):
        super().__init__()
        self.notes, self.item = notes, dspy.Predict(Item)

    def forward(self, question: str) -> dspy.Prediction:
        self.notes.seen.append(question)
        self.shown = "question -> item: Unsent"
        return super().forward(question)


def exact(example: dspy.Example, prediction: Item, trace: Notes | None = None):
    return example.answer == prediction.answer


def build():
    program = Program(Notes())
    program.set_lm(dspy.LM("openai/nobody", api_key="none"))
    return known.task(
        program=program, metric=exact, optimizers=lambda ctx: {"a": known.skill(4), "s": SIMBA(metric=exact, bsize=4)}
    )


if __name__ == "__main__":
    config = make_config({"task": "__main__:build", "strategies": ["a", "s"]})
    checked = check_sweep(config, None, build=build).first
    with open(sys.argv[1], "wb") as file:
        file.write(cloudpickle.dumps((build, checked.keys, checked.config, find_places(config.task))))
"""
RECEIVED = """
import sys

from ray import cloudpickle

from bt_ray.task.task import load_task
from bt_ray.trial.task_check import refuse_other_task

with open(sys.argv[1], "rb") as file:
    build, keys, config, places = cloudpickle.loads(file.read())
refuse_other_task(load_task(build, {}), build, config, None, keys, ["a", "s"], places)
"""


@pytest.mark.parametrize("from_a_file", [True, False])
def test_a_function_that_is_sent_is_the_same_in_each_process(from_a_file: bool, tmp_path: Path) -> None:
    """Though another `__main__` has neither its source, nor what its module has besides, nor what annotations name."""
    script, sent = tmp_path / "script.py", str(tmp_path / "sent")
    script.write_text(SENT)
    path = os.pathsep.join([str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    for command, code in (([str(script) if from_a_file else "-", sent], SENT), (["-", sent], RECEIVED)):
        done = subprocess.run(
            [sys.executable, *command],
            input=code,
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
