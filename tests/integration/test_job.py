"""The sweep as a Ray job, on a cluster started with `ray start --head`, with token authentication."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT
from support.cluster import Cluster
from support.processes import wait_for
from support.sweep_files import toml

import bt_ray

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    started = Cluster()
    try:
        started.await_ready()
        yield started
    finally:
        started.stop()


@pytest.fixture
def working_dir(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """A user's folder: the task file beside the TOML, which says nothing of this cluster."""
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copyfile(SUPPORT / "tasks.py", folder / "task.py")
    values = {key: value for key, value in settings.items() if key not in ("run_dir", "model")}
    values |= {"task": "task.py:double", "model": "./no-such-model"}
    (folder / "sweep.toml").write_text(toml(values))
    return folder


def submit(
    cluster: Cluster, working_dir: Path, model: Path, run_dir: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    sweep = ["bt-ray", "sweep", "sweep.toml", "--run-dir", str(run_dir), "--set", f"model={model}"]
    return cluster.job("submit", "--working-dir", str(working_dir), *options, "--", *sweep)


def test_a_sweep_runs_as_a_job(cluster: Cluster, working_dir: Path, model: Path, tmp_path: Path) -> None:
    done = submit(cluster, working_dir, model, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["best"]["score"], result["test_score"]) == (70.0, 70.0)
    assert 'Best program: "p -> w", 70.0 % on the valset.' in done.stdout
    wait_for("all model processes to be gone", lambda: not cluster.processes.models(), 20)

    program = bt_ray.load(tmp_path / "run" / "best", task=f"{working_dir}/task.py:double")
    assert len(program.demos) == 2


def test_a_job_that_gives_a_relative_path_fails_with_the_reason(cluster: Cluster, working_dir: Path, model: Path) -> None:
    done = submit(cluster, working_dir, model, Path("runs/today"))
    assert done.returncode != 0
    assert "A job's working directory is a copy that goes away" in done.stdout


@pytest.mark.parametrize("phase", ["scripted_server.py", "scripted_trainer.py"])
def test_a_stopped_job_leaves_no_model_process(
    cluster: Cluster, working_dir: Path, model: Path, tmp_path: Path, phase: str
) -> None:
    slow = (
        (working_dir / "sweep.toml")
        .read_text()
        .replace("env = {", 'env = {SCRIPTED_DELAY_S = "1", SCRIPTED_TRAIN_S = "60", ')
    )
    (working_dir / "sweep.toml").write_text(slow)
    submitted = submit(cluster, working_dir, model, tmp_path / "run", "--no-wait")
    job_id = re.search(r"raysubmit_\w+", submitted.stdout)
    assert job_id, submitted.stdout + submitted.stderr
    wait_for(phase, lambda: cluster.processes.named(phase), 90)
    assert cluster.job("stop", job_id[0]).returncode == 0
    wait_for("all model processes to be gone", lambda: not cluster.processes.models(), 30)


def test_a_check_looks_at_the_cluster(cluster: Cluster, working_dir: Path, model: Path) -> None:
    address = cluster.head.args[4].removeprefix("--port=")  # type: ignore[index, union-attr]
    command = [sys.executable, "-m", "bt_ray.cli", "check", "sweep.toml", "--address", f"127.0.0.1:{address}"]
    command += ["--set", f"model={model}", "--set", "server.gpus=2"]
    done = subprocess.run(
        command, env=cluster.environment, cwd=working_dir, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: A server needs 2 GPUs on one node; the largest node has 0 GPUs." in done.stderr
