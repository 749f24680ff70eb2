"""Steps are computed once: shared between strategies, found again by a second run, never lost."""

import itertools
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT
from support.object_store import ObjectStore
from support.sweep_files import toml
from test_no_orphans import SCORES, RunningSweep

import bt_ray
from bt_ray.run_dir.storage import Storage, open_storage

Computed = Callable[[], Counter[str]]
ON_A_DISK = pytest.mark.parametrize("settings", ["filesystem"], indirect=True)
"""What the kind of run directory makes no difference to."""
IN_A_STORE = pytest.mark.parametrize("settings", [pytest.param("s3", marks=pytest.mark.long)], indirect=True)
"""What other tests do on a disk."""
ALL = [" -> ".join(keys) for length in (1, 2, 3) for keys in itertools.product("pw", repeat=length)]


@pytest.fixture(params=["filesystem", pytest.param("s3", marks=pytest.mark.long)])
def settings(request: pytest.FixtureRequest, settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The settings of a sweep whose run directory is on a filesystem, or in an object store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return {**settings, "run_dir": f"s3://bucket/{tmp_path.name}"}
    return settings


@pytest.fixture
def run_dir(settings: dict[str, Any]) -> Storage:
    return open_storage(settings["run_dir"])


@pytest.fixture
def counted(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings for a task whose optimizers and baseline note each of their runs."""
    return {**settings, "task": f"{shutil.copy(SUPPORT / 'tasks.py', tmp_path / 'counted_task.py')}:counted"}


@pytest.fixture
def computed(tmp_path: Path) -> Computed:
    """How often each step was computed so far, in all processes."""
    file = tmp_path / "computed.txt"

    def read() -> Counter[str]:
        return Counter(file.read_text().splitlines()) if file.exists() else Counter()

    return read


def sweep(settings: dict[str, Any], **changed: Any) -> bt_ray.SweepResult:
    return bt_ray.sweep(settings["task"], {**settings, **changed})


def scores(result: bt_ray.SweepResult) -> dict[tuple[str, str], float | None]:
    return {(c.strategy, c.prefix): c.score for trial in result.trials for c in trial.candidates}


@ON_A_DISK
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


def run(*arguments: str, answer: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bt_ray.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=answer)


def command(*arguments: str) -> str:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@ON_A_DISK
@pytest.mark.usefixtures("local_ray")
def test_a_plan_says_what_is_new_and_steps_lists_what_is_there(
    counted: dict[str, Any], run_dir: Storage, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(toml({**counted, "strategies": ALL}))
    before = command("plan", str(file))
    assert "14 steps and 1 baseline, shared between strategies; one by one: 34 and 14." in before
    assert "Finished already: 0. To compute: 15, 7 of them fine-tune." in before
    assert run_dir.names("") == [], "a plan leaves nothing behind"

    sweep(counted, strategies=["p -> w"])
    after = command("plan", str(file))
    assert "Finished already: 3. To compute: 12, 6 of them fine-tune." in after
    assert "Evaluations of 20 examples: 12; in all at least 240 requests." in after
    assert "server minutes and 480 tokens, estimated from finished steps" in after
    assert "Not included" not in after, "p, w and the baseline are known by now"
    listed = command("steps", counted["run_dir"])
    assert [line.strip("│├└─ ").partition(" in ")[0] for line in listed.splitlines()] == [
        "baseline: 20.0 %",
        "p: 40.0 %",
        "w: 70.0 %",
    ]
    assert "20 requests, 40 tokens" in listed


@ON_A_DISK
@pytest.mark.usefixtures("local_ray")
def test_a_change_that_affects_finished_steps_is_told_and_accepted_only_on_demand(
    counted: dict[str, Any], run_dir: Storage, computed: Computed
) -> None:
    sweep(counted, strategies=["p -> w"])
    with pytest.raises(bt_ray.BtRayError) as caught:
        sweep(counted, strategies=["p -> w"], train={**counted["train"], "epochs": 9})
    said = str(caught.value)
    assert "something changed since: train (setting train.epochs). That affects" in said
    assert 'the finished steps "p -> w" but not the baseline, "p"' in said
    changed = {**counted, "strategies": ["p -> w"], "train": {**counted["train"], "epochs": 9}}
    bt_ray.sweep(counted["task"], changed, accept_changes=True)
    assert computed() == Counter({"baseline": 1, "p": 1, "p -> w": 2})
    kept = run_dir.read_json("sweep.json")
    assert [accepted["steps"] for accepted in kept["accepted_changes"]] == [["p -> w"]]


def truncate(run_dir: Storage, manifest: str, program: str, weights: str) -> None:
    run_dir.write(manifest, (run_dir.read(manifest) or b"")[:40])


def remove_manifest(run_dir: Storage, manifest: str, program: str, weights: str) -> None:
    run_dir.delete(manifest)


def another_version(run_dir: Storage, manifest: str, program: str, weights: str) -> None:
    run_dir.write_json(manifest, {**run_dir.read_json(manifest), "schema_version": 999})


def remove_program(run_dir: Storage, manifest: str, program: str, weights: str) -> None:
    run_dir.delete(program)


def remove_weights(run_dir: Storage, manifest: str, program: str, weights: str) -> None:
    run_dir.delete(f"{weights}/bt_ray_weights.json")


@pytest.mark.usefixtures("local_ray")
def test_a_damaged_step_is_computed_again_and_no_other(
    counted: dict[str, Any], run_dir: Storage, computed: Computed
) -> None:
    result = first = sweep(counted, strategies=["p -> w"])
    damages = [truncate, remove_manifest, another_version, remove_program, remove_weights]
    for times, damage in enumerate(damages, start=2):
        step = result.trials[0].candidates[-1]
        folder = step.program.rpartition("/")[0].rpartition("/")[0]
        *older, manifest = [name for name in run_dir.names(folder) if name.startswith("manifest-")]
        for name in older:
            run_dir.delete(f"{folder}/{name}")
        damage(run_dir, f"{folder}/{manifest}", step.program, f"weights/{step.weights['self']}")
        result = sweep(counted, strategies=["p -> w"])
        assert scores(result) == scores(first)
        assert computed() == Counter({"baseline": 1, "p": 1, "p -> w": times}), damage.__name__


@ON_A_DISK
@pytest.mark.usefixtures("local_ray")
def test_what_no_finished_step_needs_can_be_pruned(settings: dict[str, Any], run_dir: Storage) -> None:
    first = sweep(settings, strategies=["p -> w", "w"])
    again = bt_ray.sweep(
        settings["task"],
        {**settings, "strategies": ["p -> w", "w"], "train": {**settings["train"], "epochs": 9}},
        accept_changes=True,
    )
    needed = {weights_id for candidate in again.candidates for weights_id in candidate.weights.values()}
    assert len(run_dir.names("weights")) == 4
    assert "Remove them? [y/N]" in run("prune", settings["run_dir"], answer="n").stdout
    assert len(run_dir.names("weights")) == 4
    said = command("prune", settings["run_dir"], "--yes")
    assert "GB in 2 folders; 2 fine-tunes are kept." in said
    assert set(run_dir.names("weights")) == needed - {first.trials[0].candidates[0].weights["self"]}
    assert "nothing to remove" in command("prune", settings["run_dir"])
    command("prune", settings["run_dir"], "--yes", "--only-best")
    assert again.best is not None
    assert run_dir.names("weights") == list(again.best.weights.values())


@ON_A_DISK
@pytest.mark.usefixtures("local_ray")
def test_a_step_that_fails_has_failed_for_all_that_want_it(settings: dict[str, Any]) -> None:
    result = sweep(settings, strategies=["p -> bad -> w", "p -> bad"])
    assert {trial.error for trial in result.trials} == {"RuntimeError: this optimizer rejects everything"}
    assert all("in compile" in (trial.traceback or "") for trial in result.trials)


@pytest.mark.usefixtures("local_ray")
def test_gepa_goes_on_in_its_middle_only_if_the_settings_ask_for_it(settings: dict[str, Any], tmp_path: Path) -> None:
    calls = {}
    for resumed in (False, True):
        folder = tmp_path / str(resumed)
        folder.mkdir()
        task = f"{shutil.copy(SUPPORT / 'tasks.py', folder / 'task.py')}:reflected"
        run_dir = f"{settings['run_dir']}/{resumed}"
        again = {**settings, "run_dir": run_dir, "strategies": ["g"], "trial": {"resume_optimizers": resumed}}
        if resumed and "://" in run_dir:
            with pytest.raises(bt_ray.BtRayError, match="must be on a filesystem"):
                bt_ray.sweep(task, again)
            return
        assert bt_ray.sweep(task, again).trials[0].error is None
        log = open_storage(run_dir).read("trials/000-g/log.txt") or b""
        assert (b"Loading gepa state from run dir" in log) == resumed
        calls[resumed] = len((folder / "computed.txt").read_text().splitlines())
    assert calls[True] < calls[False], "what was done before is not done again"


def manifests(run_dir: Storage) -> set[str]:
    """The manifests of all steps."""
    folders = [f"steps/{key}" for key in run_dir.names("steps")]
    return {f"{folder}/{name}" for folder in folders for name in run_dir.names(folder) if name.startswith("manifest-")}


@IN_A_STORE
def test_a_sweep_goes_on_where_its_driver_was_killed(tmp_path: Path, settings: dict[str, Any], run_dir: Storage) -> None:
    killed = RunningSweep(tmp_path, settings)
    killed.await_phase("training")
    killed.driver.send_signal(signal.SIGKILL)
    killed.driver.wait()
    killed.assert_nothing_is_left()
    before = manifests(run_dir)
    again = RunningSweep(tmp_path, settings)
    assert again.await_result() == SCORES
    assert before <= manifests(run_dir)
    assert "2 of 3 steps are finished already" in again.output.read_text()
    again.assert_nothing_is_left()


def test_one_driver_at_a_time_holds_a_run_directory(tmp_path: Path, settings: dict[str, Any]) -> None:
    running = RunningSweep(tmp_path, settings)
    running.await_phase("serving")
    with pytest.raises(bt_ray.BtRayError, match="another sweep is running"):
        bt_ray.sweep(settings["task"], {**settings, "strategies": ["p -> w"]})
    running.driver.send_signal(signal.SIGINT)
    running.assert_nothing_is_left()


@IN_A_STORE
@pytest.mark.usefixtures("local_ray")
def test_an_object_store_that_fails_now_and_then_costs_no_result(
    counted: dict[str, Any], computed: Computed, s3: ObjectStore
) -> None:
    s3.fail(kind="503", share=0.05, seed=3)
    try:
        result = sweep(counted, strategies=ALL, server={**counted["server"], "count": 3})
    finally:
        s3.fail()
    assert [trial.error for trial in result.trials] == [None] * 14
    assert len(scores(result)) == 34 + 14
    assert set(computed()) == {"baseline", *ALL}
    alone = sweep(counted, strategies=["p -> w -> p"], run_dir=f"{counted['run_dir']}-alone")
    assert scores(alone).items() <= scores(result).items()


@IN_A_STORE
@pytest.mark.usefixtures("local_ray")
def test_many_trials_ask_an_object_store_for_little(settings: dict[str, Any], s3: ObjectStore) -> None:
    sweep(settings, strategies=ALL)
    with_time = (".lock", "status.json", "events.jsonl")
    asked = [
        line for line in s3.requests(settings["run_dir"].rpartition("/")[2]) if not any(name in line for name in with_time)
    ]
    assert len(asked) <= 60 * len(ALL), (
        "for a trial with all its steps, its share of the fine-tunes, and the sweep's own files"
    )
