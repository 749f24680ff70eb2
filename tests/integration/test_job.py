"""The sweep as a Ray job, on a cluster started with `ray start --head`, with token authentication."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SUPPORT
from support.processes import MarkedProcesses, wait_for
from support.sweep_files import toml

import bt_ray

RAY = str(Path(sys.executable).with_name("ray"))


class Cluster:
    """One head node in processes of its own."""

    def __init__(self) -> None:
        self.processes = MarkedProcesses()
        self.temp_dir = Path("/tmp") / f"bt_ray_{secrets.token_hex(4)}"  # Ray's sockets need a short path
        self.environment = {
            **self.processes.environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        port, dashboard_port, agent_port = free_ports(3)
        self.url = f"http://127.0.0.1:{dashboard_port}"
        command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}", "--num-cpus=4"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={self.temp_dir}"]
        command += [f"--dashboard-agent-listen-port={agent_port}"]  # the default is taken where another Ray runs
        self.head = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def await_ready(self) -> None:
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        wait_for("the dashboard", lambda: self._answers(headers), 90)
        wait_for("the node's job agent", lambda: self.job("submit", "--", "true").returncode == 0, 90)

    def _answers(self, headers: dict[str, str]) -> bool:
        try:
            return httpx.get(f"{self.url}/api/jobs/", headers=headers, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def job(self, *arguments: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", *arguments]
        env = {**self.environment, "RAY_ADDRESS": self.url}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)

    def stop(self) -> None:
        self.head.terminate()
        self.head.wait(30)
        for process in self.processes.all():
            process.kill()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ray wants numbers: ports that were free a moment ago."""
    bound = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in bound]
    for server in bound:
        server.close()
    return ports


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
