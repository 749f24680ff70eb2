"""A job on a cluster that starts without GPU nodes, grows, loses nodes, shrinks: Ray's autoscaler with its fake nodes."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import SCRIPTED_SCORES, SUPPORT
from support.cluster import HEAD_ID, RAY, Cluster
from support.object_store import ObjectStore
from support.processes import kill_all, wait_for
from support.scripted_model import write_model
from support.sweep_files import toml

import bt_ray
from bt_ray.run_dir.storage import open_storage

pytestmark = pytest.mark.long
LIMIT = 3


@dataclass
class NodeCount:
    """How many GPU nodes the cluster has, over time, as Ray says."""

    cluster: Cluster
    seen: list[int] = field(default_factory=list)

    def now(self, kind: str = "GPU") -> int:
        headers = {"Authorization": f"Bearer {self.cluster.environment['RAY_AUTH_TOKEN']}"}
        nodes = httpx.get(f"{self.cluster.url}/api/v0/nodes", headers=headers, timeout=30).json()["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" and node["resources_total"].get(kind, 0) > 0 for node in nodes)

    @contextmanager
    def watched(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                self.seen.append(self.now())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(30)


@pytest.fixture
def sweep_toml(tmp_path: Path, settings: dict[str, Any]) -> Path:
    values: dict[str, Any] = {**settings, "autoscaling": True}
    del values["run_dir"]
    values["server"] |= {"count": LIMIT, "gpus": 1, "accelerator_type": "L4", "idle_timeout_s": 4}
    values["server"]["env"] |= {"SCRIPTED_DELAY_S": "0.3", "SCRIPTED_TRAIN_S": "8"}
    (tmp_path / "sweep.toml").write_text(toml(values))
    return tmp_path / "sweep.toml"


def submitted(cluster: Cluster, sweep_toml: Path, run_dir: str) -> str:
    """The id of the sweep's job. No folder travels with it: nodes of one machine would clean up each other's copies."""
    done = cluster.job("submit", "--no-wait", "--", "bt-ray", "sweep", str(sweep_toml), "--run-dir", run_dir)
    job = re.search(r"raysubmit_\w+", done.stdout)
    assert job is not None, done.stdout + done.stderr
    return job[0]


def followed(cluster: Cluster, job: str) -> tuple[int, str]:
    """A job's exit code, and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "bt_ray.cli", "submit", "--follow", job, "--address", cluster.url],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def ended(cluster: Cluster, job: str) -> str:
    """What a job said, which succeeded."""
    code, logs = followed(cluster, job)
    assert code == 0, logs
    return logs


def assert_the_undisturbed_result(run_dir: str) -> None:
    result = bt_ray.SweepResult.read(f"{run_dir}/result.json")
    found = {(c.strategy, c.prefix): c.score for c in result.candidates}
    assert found == SCRIPTED_SCORES
    assert result.test_score == 70.0


def read_events(run_dir: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (open_storage(run_dir).read("events.jsonl") or b"").decode().splitlines()]


@contextmanager
def running(s3: ObjectStore) -> Iterator[Cluster]:
    cluster = Cluster(gpu_nodes=LIMIT, env=s3.environment)
    try:
        cluster.await_ready()
        yield cluster
    finally:
        cluster.stop()


def preempt(cluster: Cluster) -> int:
    """End the GPU nodes with all that runs on them, as a cloud does; returns how many there were."""
    raylets = [p for p in cluster.processes.named("raylet/raylet") if p.environ()["RAY_CLOUD_INSTANCE_ID"] != HEAD_ID]
    for raylet in raylets:
        for process in [*raylet.children(recursive=True), raylet]:
            with contextlib.suppress(psutil.Error):
                process.kill()
    return len(raylets)


def test_nodes_that_are_preempted_cost_no_result(sweep_toml: Path, s3: ObjectStore, tmp_path: Path) -> None:
    run_dir = f"s3://bucket/{tmp_path.name}/run"
    with running(s3) as cluster:
        nodes = NodeCount(cluster)
        job = submitted(cluster, sweep_toml, run_dir)
        wait_for("two trainings", lambda: len(cluster.processes.running("scripted_trainer.py")) == 2)
        assert preempt(cluster) >= 2
        ended(cluster, job)
        assert_the_undisturbed_result(run_dir)
        wait_for("the nodes to go", lambda: nodes.now() == 0)


def test_what_no_type_of_node_has_is_told_and_not_waited_for(sweep_toml: Path, s3: ObjectStore, tmp_path: Path) -> None:
    sweep_toml.write_text(sweep_toml.read_text().replace("gpus = 1", "gpus = 2"))
    with running(s3) as cluster:
        began = time.monotonic()
        job = submitted(cluster, sweep_toml, f"s3://bucket/{tmp_path.name}/run")
        code, logs = followed(cluster, job)
        assert time.monotonic() - began < 60
        assert code == 2
        assert (
            "A server needs 2 L4 GPUs and 1 CPU on one node, and the cluster's autoscaler has no type of node with that"
            in logs
        )
        assert NodeCount(cluster).now() == 0


def test_each_model_is_served_on_the_gpus_that_it_wants(sweep_toml: Path, s3: ObjectStore, tmp_path: Path) -> None:
    for file in ("tasks.py", "program_tasks.py"):
        shutil.copy(SUPPORT / file, tmp_path)
    other = tmp_path / "other"
    write_model(other, skill=7, tensors=("skill", "layer", "another"))
    values = tomllib.loads(sweep_toml.read_text()) | {"task": "program_tasks.py:two_models", "strategies": ["w"]}
    values["server"]["models"] = {str(other): {"count": 1, "accelerator_type": "H100"}}
    sweep_toml.write_text(toml(values))
    run_dir = f"s3://bucket/{tmp_path.name}/run"
    with running(s3) as cluster:
        nodes = NodeCount(cluster)
        job = submitted(cluster, sweep_toml, run_dir)
        wait_for("a node of each type", lambda: nodes.now("accelerator_type:L4") and nodes.now("accelerator_type:H100"))
        ended(cluster, job)
    (trial,) = bt_ray.SweepResult.read(f"{run_dir}/result.json").trials
    assert [candidate.score for candidate in trial.candidates] == [20.0, 50.0]
    served: dict[int, set[bool]] = {}
    for event in read_events(run_dir):
        if event.get("state", "").startswith("serving"):
            served.setdefault(event["server"], set()).add(event["weights_id"].startswith("other-"))
    assert all(len(kinds) == 1 for kinds in served.values()), "and on no others"
    assert {kind for kinds in served.values() for kind in kinds} == {False, True}


def drain(cluster: Cluster, node: str) -> None:
    """Tell Ray that a node is about to be taken back, as a cloud's warning does."""
    command = [RAY, "drain-node", f"--address={cluster.address}", f"--node-id={node}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def node_of(worker: psutil.Process) -> str:
    """The id of the node that a process of Ray's is on."""
    raylet = next(parent for parent in worker.parents() if "raylet/raylet" in " ".join(parent.cmdline()))
    return str(raylet.environ()["RAY_OVERRIDE_NODE_ID_FOR_TESTING"])


def test_a_cluster_grows_with_a_sweep_leaves_a_drained_node_and_shrinks(
    sweep_toml: Path, s3: ObjectStore, tmp_path: Path
) -> None:
    run_dir = f"s3://bucket/{tmp_path.name}/run"
    with running(s3) as cluster:
        nodes = NodeCount(cluster)
        assert nodes.now() == 0
        with nodes.watched():
            job = submitted(cluster, sweep_toml, run_dir)
            wait_for("a training", lambda: cluster.processes.running("scripted_trainer.py"))
            drain(cluster, node_of(cluster.processes.named("ray::ModelServer")[0]))
            logs = ended(cluster, job)
            wait_for("the nodes to go", lambda: nodes.now() == 0)
    assert "The sweep waits for the cluster to grow" in logs
    assert_the_undisturbed_result(run_dir)
    assert 2 <= max(nodes.seen) <= LIMIT

    events = read_events(run_dir)
    (left,) = [event for event in events if event.get("state") == "leaving"]
    after = [event for event in events if event.get("server") == left["server"] and event["at"] > left["at"]]
    assert "granted" not in {event["state"] for event in after}, "it gets nothing new"
    assert after[-1]["state"] == "released"
    assert "is being drained" in after[-1]["reason"]
    assert len([event for event in events if event["state"] == "training"]) == 2, "no training was lost"


def test_a_new_cluster_goes_on_where_the_head_was_lost(sweep_toml: Path, s3: ObjectStore, tmp_path: Path) -> None:
    run_dir = f"s3://bucket/{tmp_path.name}/run"
    with running(s3) as cluster:
        submitted(cluster, sweep_toml, run_dir)
        wait_for("a training", lambda: cluster.processes.running("scripted_trainer.py"))
        kill_all(cluster.processes.all())
    with running(s3) as cluster:
        logs = ended(cluster, submitted(cluster, sweep_toml, run_dir))
    assert "steps are finished already" in logs
    assert_the_undisturbed_result(run_dir)
