"""Steps are computed once: shared between strategies, found again by a second run, never lost."""

import itertools
import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT
from test_no_orphans import SCORES, RunningSweep

import bt_ray

Computed = Callable[[], Counter[str]]
ALL = [" -> ".join(keys) for length in (1, 2, 3) for keys in itertools.product("pw", repeat=length)]


@pytest.fixture
def counted(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for a task whose optimizers and baseline note each of their runs."""
    return {**settings, "task": f"{SUPPORT / 'tasks.py'}:counted"}


@pytest.fixture
def computed(settings: dict[str, Any]) -> Computed:
    """How often each step was computed so far, in all processes."""
    file = Path(settings["run_dir"]).with_name("computed.txt")

    def read() -> Counter[str]:
        return Counter(file.read_text().splitlines()) if file.exists() else Counter()

    return read


def sweep(settings: dict[str, Any], **changed: Any) -> bt_ray.SweepResult:
    return bt_ray.sweep(settings["task"], {**settings, **changed})


def scores(result: bt_ray.SweepResult) -> dict[tuple[str, str], float | None]:
    return {(c.strategy, c.prefix): c.score for trial in result.trials for c in trial.candidates}


@pytest.mark.usefixtures("local_ray")
def test_all_strategies_up_to_length_3_are_14_steps_and_a_baseline(counted: dict[str, Any], computed: Computed) -> None:
    result = sweep(counted, strategies=ALL, server={**counted["server"], "count": 3})
    assert [trial.error for trial in result.trials] == [None] * 14
    assert len(scores(result)) == 34 + 14
    assert computed() == Counter(["baseline", *ALL])

    # What a strategy alone gives, in a run directory of its own.
    for strategy in ("p -> w -> p", "w -> w -> w"):
        alone = sweep(counted, strategies=[strategy], run_dir=f"{counted['run_dir']}-{len(strategy)}-{strategy[0]}")
        assert scores(alone).items() <= scores(result).items()
        programs = [json.loads((Path(alone.run_dir) / c.program).read_text())["demos"] for c in alone.trials[0].candidates]
        shared = result.trials[ALL.index(strategy)].candidates
        assert [json.loads((Path(result.run_dir) / c.program).read_text())["demos"] for c in shared] == programs


@pytest.mark.usefixtures("local_ray")
def test_a_second_run_computes_only_what_is_new(counted: dict[str, Any], computed: Computed, request_log: Any) -> None:
    first = sweep(counted, strategies=["p -> w"])
    asked = len(request_log())
    told: list[str] = []
    again = bt_ray.sweep(
        counted["task"],
        {**counted, "strategies": ["p -> w"]},
        listener=lambda event: told.append(getattr(event, "text", "")),
    )
    assert (scores(again), again.test_score) == (scores(first), first.test_score)
    assert "3 of 3 steps are finished already, the baseline included" in told
    assert not [text for text in told if "server" in text], "no server was placed"
    assert len(request_log()) == asked

    more = sweep(counted, strategies=["p -> w", "p -> w -> p"])
    assert computed() == Counter(["baseline", "p", "p -> w", "p -> w -> p"])
    assert scores(first).items() <= scores(more).items()


@pytest.mark.usefixtures("local_ray")
def test_a_change_that_affects_finished_steps_is_told_and_accepted_only_on_demand(
    counted: dict[str, Any], computed: Computed
) -> None:
    sweep(counted, strategies=["p -> w"])
    with pytest.raises(bt_ray.BtRayError) as caught:
        sweep(counted, strategies=["p -> w"], train={**counted["train"], "epochs": 9})
    assert 'something changed since: train. That affects the finished steps "p -> w" but not the baseline, "p"' in str(
        caught.value
    )
    changed = {**counted, "strategies": ["p -> w"], "train": {**counted["train"], "epochs": 9}}
    bt_ray.sweep(counted["task"], changed, accept_changes=True)
    assert computed() == Counter({"baseline": 1, "p": 1, "p -> w": 2})
    kept = json.loads((Path(counted["run_dir"]) / "sweep.json").read_text())
    assert [accepted["steps"] for accepted in kept["accepted_changes"]] == [["p -> w"]]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("damage", ["truncated manifest", "no manifest", "other version", "no program", "no weights"])
def test_a_damaged_step_is_computed_again_and_no_other(counted: dict[str, Any], computed: Computed, damage: str) -> None:
    result = sweep(counted, strategies=["p -> w"])
    run_dir = Path(result.run_dir)
    step = result.trials[0].candidates[-1]
    (manifest,) = (run_dir / step.program).parents[1].glob("manifest-*.json")
    match damage:
        case "truncated manifest":
            manifest.write_text(manifest.read_text()[:40])
        case "no manifest":
            manifest.unlink()
        case "other version":
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 999}))
        case "no program":
            (run_dir / step.program).unlink()
        case "no weights":
            (run_dir / "weights" / step.weights["self"] / "bt_ray_weights.json").unlink()
    again = sweep(counted, strategies=["p -> w"])
    assert scores(again) == scores(result)
    assert computed() == Counter({"baseline": 1, "p": 1, "p -> w": 2})


@pytest.mark.usefixtures("local_ray")
def test_a_step_that_fails_has_failed_for_all_that_want_it(settings: dict[str, Any]) -> None:
    result = sweep(settings, strategies=["p -> bad -> w", "p -> bad"])
    assert {trial.error for trial in result.trials} == {"RuntimeError: this optimizer rejects everything"}
    assert all("in compile" in (trial.traceback or "") for trial in result.trials)


@pytest.mark.parametrize("phase", ["serving", "training"])
def test_a_sweep_goes_on_where_its_driver_was_killed(tmp_path: Path, settings: dict[str, Any], phase: str) -> None:
    killed = RunningSweep(tmp_path, settings)
    killed.await_phase(phase)
    killed.driver.send_signal(signal.SIGKILL)
    killed.driver.wait(20)
    killed.assert_nothing_is_left()
    manifests = set(Path(settings["run_dir"]).glob("steps/*/manifest-*.json"))
    again = RunningSweep(tmp_path, settings)
    assert again.await_result() == SCORES
    assert manifests <= set(Path(settings["run_dir"]).glob("steps/*/manifest-*.json"))
    if phase == "training":
        assert "2 of 3 steps are finished already" in again.output.read_text()
    again.assert_nothing_is_left()


def test_one_driver_at_a_time_holds_a_run_directory(tmp_path: Path, settings: dict[str, Any]) -> None:
    running = RunningSweep(tmp_path, settings)
    running.await_phase("serving")
    with pytest.raises(bt_ray.BtRayError, match="another sweep is running"):
        bt_ray.sweep(settings["task"], {**settings, "strategies": ["p -> w"]})
    running.driver.send_signal(signal.SIGINT)
    running.assert_nothing_is_left()
