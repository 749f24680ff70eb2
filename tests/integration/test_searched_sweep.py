"""A sweep that searches for the best strategy, within a budget, on a real Ray with scripted servers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT

import bt_ray
from bt_ray.events import StepFinished
from bt_ray.strategy import prefixes

pytestmark = pytest.mark.usefixtures("local_ray")

TASK = """
from tasks import *


def build():
    def optimizers(ctx):
        return {"p": Demos(), "w": BootstrapFinetune(metric=exact), "bad": Failing()}

    return double(optimizers=optimizers)
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    shutil.copy(SUPPORT / "tasks.py", tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    return f"{tmp_path / 'task.py'}:build"


def search(settings: dict[str, Any], budget: str, *optimizers: str) -> dict[str, Any]:
    keys = {"optimizers": optimizers} if optimizers else {}
    return {**settings, "strategies": {"search": {"max_length": 3, "budget": budget, **keys}}}


def computed(result: bt_ray.SweepResult) -> list[str]:
    """The steps of the run directory, without the baseline."""
    found = {candidate.prefix for trial in result.trials for candidate in trial.candidates} - {""}
    assert len(list(Path(result.run_dir, "steps").iterdir())) == len(found) + 1
    return sorted(found)


def test_it_spends_its_budget_goes_on_with_a_larger_one_and_says_what_it_did_not_try(
    settings: dict[str, Any], task: str
) -> None:
    result = bt_ray.sweep(task, search(settings, "5 steps", "p", "w"))
    steps = computed(result)
    assert len(steps) == 5
    assert all(prefix in steps for step in steps for prefix in prefixes(step))
    assert result.best is not None
    assert result.best.prefix in steps
    assert result.believed is not None
    assert result.believed.prefix in steps
    assert bt_ray.SweepResult.read(Path(settings["run_dir"]) / "result.json") == result
    assert {skipped.reason for skipped in result.skipped} == {"the budget of 5 steps was spent"}
    assert not {skipped.prefix for skipped in result.skipped} & set(steps)

    events: list[Any] = []
    same = bt_ray.sweep(task, search(settings, "5 steps", "p", "w"), listener=events.append)
    assert (computed(same), same.best and same.best.prefix) == (steps, result.best.prefix)
    assert not [event for event in events if isinstance(event, StepFinished) and not event.loaded]

    more = computed(bt_ray.sweep(task, search(settings, "7 steps", "p", "w")))
    assert len(more) == 7
    assert set(steps) < set(more), "what was computed counts, and is not computed again"


@pytest.mark.long
def test_with_enough_budget_it_tries_everything_and_ends(settings: dict[str, Any], task: str) -> None:
    result = bt_ray.sweep(task, search(settings, "1000 tokens", "w"))
    assert computed(result) == ["w", "w -> w", "w -> w -> w"]
    assert result.skipped == ()
    assert result.best is not None
    assert (result.best.prefix, result.best.score) == ("w -> w -> w", 100.0)


def test_a_step_that_fails_is_told_and_nothing_below_it_is_tried(settings: dict[str, Any], task: str) -> None:
    result = bt_ray.sweep(task, search(settings, "50 steps", "p", "bad"))
    assert not [step for step in computed(result) if "bad" in step]
    failed = {skipped.prefix for skipped in result.skipped if skipped.reason == "it failed"}
    assert failed == {"bad", "p -> bad", "p -> p -> bad"}
    assert {trial.error for trial in result.trials if "bad" in trial.strategy} == {
        "RuntimeError: this optimizer rejects everything"
    }


def test_a_search_takes_no_space(settings: dict[str, Any], task: str) -> None:
    with pytest.raises(bt_ray.BtRayError, match="a search over strategies takes no space"):
        bt_ray.sweep(task, {**search(settings, "3 steps"), "space": {"seed": [0, 1]}})
