"""Steps are computed once: shared between strategies, found again by a second run, never lost."""

import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT
from support.sweep_files import toml
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


def command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "bt_ray.cli", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("local_ray")
def test_a_plan_says_what_is_new_and_steps_lists_what_is_there(counted: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(toml({**counted, "strategies": ALL}))
    before = command("plan", str(file))
    assert "14 steps and 1 baseline, shared between strategies; one by one: 34 and 14." in before
    assert "Finished already: 0. To compute: 15, 7 of them fine-tune." in before
    assert not Path(counted["run_dir"]).exists(), "a plan leaves nothing behind"

    sweep(counted, strategies=["p -> w"])
    after = command("plan", str(file))
    assert "Finished already: 3. To compute: 12, 6 of them fine-tune." in after
    assert "Evaluations of 20 examples: 12; in all at least 240 requests." in after
    assert "Not in that" not in after, "p, w and the baseline are known by now"
    listed = command("steps", counted["run_dir"])
    assert [line.strip("│├└─ ").partition(" in ")[0] for line in listed.splitlines()] == [
        "baseline: 20.0 %",
        "p: 40.0 %",
        "w: 70.0 %",
    ]
    assert "20 requests" in listed


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


def truncate(manifest: Path, program: Path, weights: Path) -> None:
    manifest.write_text(manifest.read_text()[:40])


def remove_manifest(manifest: Path, program: Path, weights: Path) -> None:
    manifest.unlink()


def another_version(manifest: Path, program: Path, weights: Path) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 999}))


def remove_program(manifest: Path, program: Path, weights: Path) -> None:
    program.unlink()


def remove_weights(manifest: Path, program: Path, weights: Path) -> None:
    (weights / "bt_ray_weights.json").unlink()


@pytest.mark.usefixtures("local_ray")
def test_a_damaged_step_is_computed_again_and_no_other(counted: dict[str, Any], computed: Computed) -> None:
    result = first = sweep(counted, strategies=["p -> w"])
    run_dir = Path(first.run_dir)
    damages = [truncate, remove_manifest, another_version, remove_program, remove_weights]
    for times, damage in enumerate(damages, start=2):
        step = result.trials[0].candidates[-1]
        program = run_dir / step.program
        manifest = max(program.parents[1].glob("manifest-*.json"))
        for older in set(program.parents[1].glob("manifest-*.json")) - {manifest}:
            older.unlink()
        damage(manifest, program, run_dir / "weights" / step.weights["self"])
        result = sweep(counted, strategies=["p -> w"])
        assert scores(result) == scores(first)
        assert computed() == Counter({"baseline": 1, "p": 1, "p -> w": times}), damage.__name__


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
