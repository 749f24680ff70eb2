"""What Prometheus would find on a node's metrics port while a sweep runs."""

import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SUPPORT
from support.cluster import Cluster
from support.processes import wait_for
from support.sweep_files import toml

SCRAPE = """
import ray
ray.init(address="auto", log_to_driver=False)
print("PORT", [node["MetricsExportPort"] for node in ray.nodes()][0])
"""
NAMES = (
    "ray_bt_ray_servers{",
    "ray_bt_ray_leases_waiting{",
    "ray_bt_ray_serve_seconds_bucket{",
    "ray_bt_ray_step_seconds_bucket{",
    "ray_bt_ray_requests_total{",
    'direction="in"',
    'direction="out"',
)


@pytest.mark.long
def test_servers_leases_steps_requests_and_tokens_are_exported(settings: dict[str, Any], tmp_path: Path) -> None:
    cluster = Cluster(env={"RAY_metrics_report_interval_ms": "1000"})
    try:
        cluster.await_ready()
        task = shutil.copy(SUPPORT / "tasks.py", tmp_path / "task.py")
        values = {**settings, "task": f"{task}:double"}
        values["server"] = {**settings["server"], "env": {**settings["server"]["env"], "SCRIPTED_TRAIN_S": "8"}}
        (tmp_path / "sweep.toml").write_text(toml(values))
        found = cluster.job("submit", "--", sys.executable, "-c", SCRAPE).stdout
        port = int(found.partition("PORT ")[2].split()[0])
        command = [sys.executable, "-m", "bt_ray.cli", "sweep", str(tmp_path / "sweep.toml")]
        done: list[Any] = []
        sweep = threading.Thread(target=lambda: done.append(cluster.job("submit", "--", *command)))
        sweep.start()
        seen: set[str] = set()

        def look() -> bool:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
            seen.update(name for name in NAMES if name in text)
            return seen == set(NAMES) or not sweep.is_alive()

        wait_for("all metrics", look)
        sweep.join(120)
        assert done[0].returncode == 0, done[0].stdout
        assert seen == set(NAMES)
    finally:
        cluster.stop()
