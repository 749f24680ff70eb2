"""The sweep as a Ray job, on a cluster started with `ray start --head`, with token authentication."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SUPPORT
from support.cluster import Cluster
from support.processes import wait_for
from support.sweep_files import toml
from typer.testing import CliRunner

import bt_ray
from bt_ray.cli import app

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
    wait_for("all model processes to be gone", lambda: not cluster.processes.models())

    program = bt_ray.load(tmp_path / "run" / "best", task=f"{working_dir}/task.py:double")
    assert len(program.demos) == 2

    assert_served_on_the_cluster(cluster, tmp_path / "run")


def assert_served_on_the_cluster(cluster: Cluster, run_dir: Path) -> None:
    """`bt-ray serve` on a node, until Ctrl-C, which leaves nothing."""
    output = run_dir.with_name("serve.txt")
    command = [sys.executable, "-u", "-m", "bt_ray.cli", "serve", str(run_dir), "--address", cluster.address]
    gated = {**cluster.environment, "HF_TOKEN": "hf_for_gated_models"}
    with output.open("w") as opened:
        serving = subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT, env=gated)
    try:
        wait_for("the address", lambda: "print(program" in output.read_text() or serving.poll() is not None)
        said = dict(re.findall(r"^(model|address|token) +(\S+)$", output.read_text(), re.MULTILINE))
        program = bt_ray.load(run_dir, served_at=said["address"], token=said["token"], task=f"{SUPPORT}/tasks.py:double")
        assert program(question="number 26").answer == "52"
        assert httpx.get(f"{said['address']}/models", timeout=60).status_code == 401, "whoever has no token is refused"

        (process,) = cluster.processes.running("scripted_server.py")
        assert process.environ()["HF_TOKEN"] == gated["HF_TOKEN"], "a node fetches models as who started this may"
        actors = cluster.processes.named("ray::ModelServer")
        assert len(actors) == 1
        actors[0].kill()
        wait_for("another server", lambda: "It is at" in output.read_text())
        moved = re.findall(r"It is at (\S+)", output.read_text())[-1]
        program = bt_ray.load(run_dir, served_at=moved, token=said["token"], task=f"{SUPPORT}/tasks.py:double")
        assert program(question="number 25").answer == "50"
    finally:
        serving.send_signal(signal.SIGINT)
        assert serving.wait() == 130
    wait_for("its model process to be gone", lambda: not cluster.processes.models())
    files = [file for folder in (run_dir.parent, cluster.temp_dir) for file in folder.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if gated["HF_TOKEN"].encode() in file.read_bytes()], "it is written nowhere"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer " + "another" * 8}])
def test_the_dashboard_and_its_jobs_refuse_whoever_has_no_token(cluster: Cluster, headers: dict[str, str]) -> None:
    for route in ("/api/jobs/", "/api/v0/nodes", "/api/v0/actors", "/nodes?view=summary", "/api/cluster_status"):
        assert httpx.get(f"{cluster.url}{route}", headers=headers, timeout=60).status_code in (401, 403), route
    submitted = httpx.post(f"{cluster.url}/api/jobs/", headers=headers, json={"entrypoint": "true"}, timeout=60)
    assert submitted.status_code in (401, 403)


def test_a_job_that_gives_a_relative_path_fails_with_the_reason(cluster: Cluster, working_dir: Path, model: Path) -> None:
    done = submit(cluster, working_dir, model, Path("runs/today"))
    assert done.returncode != 0
    assert "A job's working directory is a copy that goes away" in done.stdout


def slowed(working_dir: Path) -> None:
    file = working_dir / "sweep.toml"
    file.write_text(file.read_text().replace("env = {", 'env = {SCRIPTED_DELAY_S = "1", SCRIPTED_TRAIN_S = "60", '))


def test_a_stopped_job_leaves_no_model_process(cluster: Cluster, working_dir: Path, model: Path, tmp_path: Path) -> None:
    slowed(working_dir)
    submitted = submit(cluster, working_dir, model, tmp_path / "run", "--no-wait")
    job_id = re.search(r"raysubmit_\w+", submitted.stdout)
    assert job_id, submitted.stdout + submitted.stderr
    wait_for("a server", lambda: cluster.processes.named("scripted_server.py"))
    assert cluster.job("stop", job_id[0]).returncode == 0
    wait_for("all model processes to be gone", lambda: not cluster.processes.models())


class Submitting:
    """`bt-ray submit`, as a child process in the user's folder."""

    def __init__(self, cluster: Cluster, folder: Path, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-u", "-m", "bt_ray.cli", "submit", *arguments, "--address", cluster.url]
        self.process = subprocess.Popen(
            command,
            env={**cluster.environment, **environment},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it said."""
        said, _ = self.process.communicate()
        return self.process.returncode, said

    def interrupt(self, answer: str) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(answer)
        return self.process.returncode, said


def test_a_submitted_sweep_is_followed_left_alone_and_stopped(
    cluster: Cluster, working_dir: Path, model: Path, tmp_path: Path
) -> None:
    slowed(working_dir)
    (working_dir / ".gitignore").write_text("large.bin\n")
    (working_dir / "large.bin").write_bytes(b"0" * 200_000_000)  # more than a job may bring
    options = ["sweep.toml", "--run-dir", str(tmp_path / "run"), "--set", f"model={model}", "--strategy", "w"]
    submitting = Submitting(cluster, working_dir, *options)
    wait_for("a training", lambda: cluster.processes.named("scripted_trainer.py"))
    code, said = submitting.interrupt("n\n")
    job = re.search(r"Submitted (raysubmit_\w+): bt-ray sweep sweep.toml --strategy w", said)
    assert job is not None, said
    assert code == 0
    assert f"The job continues. To follow it: bt-ray submit --follow {job[1]} --address {cluster.url}" in said
    assert "Placing 2 model servers" in said, "what the job says is told"

    following = Submitting(cluster, working_dir, "--follow", job[1])
    assert following.process.stdout is not None
    wait_for("what it said before", lambda: "Placing 2 model servers" in following.process.stdout.readline())
    assert cluster.processes.named("scripted_trainer.py")
    code, said = following.interrupt("y\n")
    assert code == 130
    assert "The job is stopped" in said
    wait_for("all model processes to be gone", lambda: not cluster.processes.models())


def test_a_submitted_sweep_that_fails_gives_its_reason_and_its_exit_code(
    cluster: Cluster, working_dir: Path, model: Path, tmp_path: Path
) -> None:
    options = ["sweep.toml", "--run-dir", str(tmp_path / "run"), "--set", f"model={model}", "--strategy", "x"]
    code, said = Submitting(cluster, working_dir, *options).end()
    assert code == 2
    assert "error: " in said
    job = re.search(r"raysubmit_\w+", said)
    assert job is not None
    again = Submitting(cluster, working_dir, "--follow", job[0]).end()
    assert again[0] == 2
    assert again[1].strip() in said

    assert Submitting(cluster, working_dir, "--follow", "raysubmit_none").end() == (
        2,
        f"error: {cluster.url} has no job raysubmit_none.\n",
    )
    code, said = Submitting(cluster, working_dir, *options, RAY_AUTH_TOKEN="another" * 8).end()
    assert code == 2
    assert "wants another token: set RAY_AUTH_MODE=token" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "Give the sweep's TOML, or --follow with a job"),
        (["sweep.toml"], "A job's own folder is deleted with it"),
        (["sweep.toml", "--run-dir", "runs/here"], "run_dir: runs/here is relative"),
        (["sweep.toml", "--run-dir", "/shared/run"], "No jobs can be submitted to http://127.0.0.1:9"),
    ],
)
def test_a_sweep_that_cannot_be_a_job_is_told_here(
    working_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    monkeypatch.chdir(working_dir)
    model = ["--set", "model=org/model"] if arguments else []
    told = CliRunner().invoke(app, ["submit", *arguments, *model, "--address", "http://127.0.0.1:9"])
    assert told.exit_code == 2
    assert reason in told.output


def test_a_check_looks_at_the_cluster(cluster: Cluster, working_dir: Path, model: Path) -> None:
    address = cluster.head.args[4].removeprefix("--port=")  # type: ignore[index, union-attr]
    command = [sys.executable, "-m", "bt_ray.cli", "check", "sweep.toml", "--address", f"127.0.0.1:{address}"]
    command += ["--set", f"model={model}", "--set", "server.gpus=2"]
    done = subprocess.run(command, env=cluster.environment, cwd=working_dir, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: A server needs 2 GPUs on one node; the largest node has 0 GPUs." in done.stderr
