"""A sweep of all strategies up to length 3 is killed at seeded moments, and gives the result of an undisturbed one."""

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SUPPORT
from support import tasks
from support.cluster import Cluster
from support.object_store import ObjectStore
from support.processes import kill_all, wait_for
from support.reference import reference_run
from support.scripted_model import write_model
from support.slot_models import SlotModels
from support.sweep_files import toml

from bt_ray.run_dir.results import SweepResult
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.settings.config import make_config
from bt_ray.trial.lm import assign_lm

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(600)]
ALL = [" -> ".join(keys) for length in (1, 2, 3) for keys in itertools.product("pw", repeat=length)]
TRIALS = ("ray::run_trial", "ray::ImplicitFunc")
MOMENTS = [("commit", "training", "any", "any", "any")] * 2 + [("commit", "training", "commit", "training", "any")] * 2
"""For each seed, where the five kills of one sweep fall: of 20, 6 inside a commit and 6 inside a training."""
Seen = dict[tuple[str, str], tuple[float | None, Any]]


class Sweep:
    """The sweep of one test, on the tests' cluster: it may be run again."""

    def __init__(self, cluster: Cluster, folder: Path, settings: dict[str, Any], run_dir: str) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run_dir = open_storage(run_dir)
        task = shutil.copy(SUPPORT / "tasks.py", folder / "counted_task.py")
        server = {**settings["server"], "count": 3, "env": {"SCRIPTED_TRAIN_S": "0.8"}}
        values = {**settings, "strategies": ALL, "run_dir": run_dir, "task": f"{task}:counted", "server": server}
        values["trial"] = {"max_failures": 5}
        (folder / "sweep.toml").write_text(toml(values))
        self.driver = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "bt_ray.cli", "sweep", str(self.folder / "sweep.toml")]
        command += ["--address", self.cluster.address]
        with (self.folder / "output.txt").open("a") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=self.cluster.environment)

    def computed(self) -> "Counter[str]":
        """How often each step was computed so far."""
        file = self.folder / "computed.txt"
        return Counter(file.read_text().splitlines()) if file.exists() else Counter()

    def committed(self) -> set[str]:
        """The prefixes of the steps that are committed."""
        names = [f"steps/{key}/{name}" for key in self.run_dir.names("steps") for name in self.run_dir.names(f"steps/{key}")]
        manifests = (self.run_dir.read_json(name) for name in names if "/manifest-" in name)
        return {manifest["prefix"] or "baseline" for manifest in manifests}

    def await_commits(self, count: int) -> None:
        wait_for(f"{count} commits", lambda: len(self.committed()) >= count or self.driver.poll() is not None)

    def result(self) -> Seen:
        """What each candidate is, when the sweep has ended by itself."""
        assert self.driver.wait() == 0, (self.folder / "output.txt").read_text()
        result = SweepResult.read(f"{self.run_dir.location}/result.json")
        assert [trial.error for trial in result.trials] == [None] * len(ALL)
        return {(c.strategy, c.prefix): (c.score, self.run_dir.read_json(c.program)["demos"]) for c in result.candidates}

    def processes(self, *names: str) -> list[psutil.Process]:
        return self.cluster.processes.named(*names)

    def await_quiet(self) -> None:
        """Nothing that the sweep started runs any more."""
        wait_for("models to be gone", lambda: not self.cluster.processes.models())
        wait_for("trials to be gone", lambda: not self.processes(*TRIALS, "ray::StepClaims", "ray::ModelServer"))


def uncommitted(run_dir: Storage) -> set[str]:
    """Attempts whose program is written and whose manifest is not."""
    found = set()
    for key in run_dir.names("steps"):
        names = run_dir.names(f"steps/{key}")
        attempts = {name for name in names if not name.startswith("manifest-")}
        found |= {f"{key}/{name}" for name in attempts if f"manifest-{name}.json" not in names}
    return found


def moments(seed: int) -> Iterator[tuple[str, int, random.Random]]:
    """The kills of one sweep: where each falls, after how many commits, and what else is left to chance."""
    chance = random.Random(seed)
    after = sorted(chance.sample(range(11), 5))
    yield from ((phase, commits, chance) for phase, commits in zip(MOMENTS[seed], after, strict=True))


def await_moment(sweep: Sweep, phase: str, commits: int, chance: random.Random) -> list[psutil.Process]:
    """Return at a moment of the sweep. What is returned was stopped for it, and is to be let go after the kill."""
    sweep.await_commits(commits)
    if phase == "commit":
        return await_commit(sweep)
    if phase == "training":
        trainings = sweep.cluster.processes
        wait_for("a training", lambda: trainings.running("scripted_trainer.py") or sweep.driver.poll() is not None)
    else:
        time.sleep(chance.uniform(0, 1))
    assert sweep.driver.poll() is None, "the sweep ended before the moment came"
    return []


def await_commit(sweep: Sweep) -> list[psutil.Process]:
    """Return inside a commit, with the claims stopped.

    A commit asks them between the program and the manifest, so while they are silent, it stays there.
    """
    (claims,) = wait_for("the claims", lambda: sweep.processes("ray::StepClaims"))
    for _ in range(20):
        begun = sweep.computed().total()
        wait_for("a step", lambda began=begun: sweep.computed().total() > began or sweep.driver.poll() is not None)
        claims.suspend()  # what has begun is computed all the same, and then waits for its commit
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if uncommitted(sweep.run_dir):
                time.sleep(0.3)
                if uncommitted(sweep.run_dir):
                    return [claims]
        claims.resume()  # it had been committed before the claims were stopped
    raise AssertionError("no commit came")


@pytest.fixture(scope="module")
def cluster(s3: ObjectStore) -> Iterator[Cluster]:
    started = Cluster(cpus=8, env=s3.environment)
    try:
        started.await_ready()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model for all tests of this file, so that their results can be compared."""
    folder = tmp_path_factory.mktemp("model") / "scripted-model"
    write_model(folder, skill=2)
    return folder


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("undisturbed")
    sweep = Sweep(cluster, folder, scripted(model), str(folder / "run"))
    result = sweep.result()
    assert sweep.computed() == Counter(["baseline", *ALL])
    assert len(result) == 34 + 14
    return result


def scripted(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "num_threads": 4,
        "server": {"command": [sys.executable, str(SUPPORT / "scripted_server.py")]},
        "train": {"command": [sys.executable, str(SUPPORT / "scripted_trainer.py")], "checkpoint_every_s": 0},
    }


@pytest.fixture
def sweep(storage_kind: str, cluster: Cluster, model: Path, tmp_path: Path) -> Iterator[Sweep]:
    run_dir = f"s3://bucket/{tmp_path.name}" if storage_kind == "s3" else str(tmp_path / "run")
    made = Sweep(cluster, tmp_path, scripted(model), run_dir)
    yield made
    made.driver.kill()
    made.driver.wait()
    made.await_quiet()


def test_each_strategy_gives_what_dspy_gives_for_it_alone(undisturbed: Seen, model: Path, tmp_path: Path) -> None:
    models = SlotModels(make_config({**scripted(model), "task": "unused:unused", "strategies": ALL}), tmp_path)
    for strategy in ALL:
        task, lm = tasks.double(testset=None), models.lm()
        assign_lm(task.program, lm)
        program = reference_run(task, lm, 0, strategy=strategy, num_threads=4)
        alone = {
            (strategy, found["strategy"]): (found["score"], [demo.toDict() for demo in found["program"].demos])
            for found in program.candidate_programs
        }
        assert alone == {named: seen for named, seen in undisturbed.items() if named[0] == strategy}
    models.close()


KILLED = [*(("filesystem", seed) for seed in range(len(MOMENTS) - 1)), ("s3", len(MOMENTS) - 1)]


@pytest.mark.parametrize(("storage_kind", "seed"), KILLED)
def test_a_killed_driver_costs_no_committed_step(sweep: Sweep, undisturbed: Seen, seed: int) -> None:
    for phase, commits, chance in moments(seed):
        stopped = await_moment(sweep, phase, commits, chance)
        sweep.driver.send_signal(signal.SIGKILL)
        sweep.driver.wait()
        for process in stopped:
            process.resume()
        sweep.await_quiet()
        committed, computed = sweep.committed(), sweep.computed()
        sweep.driver = sweep.start()
        sweep.await_commits(len(committed) + 1)
        assert not set(sweep.computed() - computed) & committed
    assert sweep.result() == undisturbed
    again = sweep.computed() - computed
    assert set(again) == {"baseline", *ALL} - committed
    assert set(again.values()) <= {1}
    sweep.await_quiet()


@pytest.mark.parametrize(("storage_kind", "seed"), KILLED)
def test_killed_trials_cost_no_committed_step(sweep: Sweep, undisturbed: Seen, seed: int) -> None:
    for phase, commits, chance in moments(seed):
        stopped = await_moment(sweep, phase, commits, chance)
        committed, computed = sweep.committed(), sweep.computed()
        trials = sweep.processes(*TRIALS)
        kill_all(trials if phase == "commit" else chance.sample(trials, min(2, len(trials))))
        for process in stopped:
            process.resume()
        sweep.await_commits(len(committed) + 1)
        assert not set(sweep.computed() - computed) & committed
    assert sweep.result() == undisturbed
    sweep.await_quiet()
