"""A score is that of the program that is kept, in one process or several; what would not be kept is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT

import bt_ray
from bt_ray.run_dir.results import SweepResult

pytestmark = pytest.mark.usefixtures("local_ray")

REFUSED = {
    "attribute": "the attribute bonus (which was added)",
    "forward": "the attribute forward (which was added)",
    "unkept": "config['response_format'] of predictor predict",
    "demos": "demo 1 of predictor predict: its answer (tuple)",
    "another": "its class (Known, the task's program is a Bent)",
}
KEPT = {"honest": 40.0, "config": 70.0, "lm": 50.0, "config -> lm": 100.0}


def swept(folder: Path, processes: int) -> SweepResult:
    strategies = [*REFUSED, "honest", "lm", "config -> lm"]
    settings = {"strategies": strategies, "run_dir": str(folder / "run"), "trial": {"processes": processes}}
    return bt_ray.sweep(f"{SUPPORT / 'bent.py'}:build", settings)


@pytest.mark.parametrize("processes", [1, 2])
def test_no_optimizer_wins_with_what_is_not_kept(processes: int, tmp_path: Path) -> None:
    result = swept(tmp_path, processes)
    errors = {trial.strategy: trial.error for trial in result.trials}
    for strategy, lost in REFUSED.items():
        error = errors.pop(strategy) or ""
        assert lost in error
        assert f"Change (optimizer {strategy!r}) made a program that would not be kept as it is" in error
    assert set(errors.values()) == {None}
    assert {c.prefix: c.score for c in result.candidates if c.prefix} == KEPT
    assert result.best is not None
    assert result.best.prefix == "config -> lm"
    best = bt_ray.load(tmp_path / "run")
    assert best.predictors()[0].config == {"top_k": 5}
    assert best.predictors()[0].lm.kwargs["top_k"] == 3
    assert score_of(best) == result.best.score


def score_of(program: Any) -> float:
    right = Counter(program(question=f"number {n}").answer == str(2 * n) for n in range(20))
    return 100 * right[True] / 20
