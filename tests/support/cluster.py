"""A Ray head node in processes of its own, as `ray start --head` makes it."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from support.processes import MarkedProcesses, kill_all, wait_for

RAY = str(Path(sys.executable).with_name("ray"))


HEAD_ID = "f" * 51 + "00000"
"""What Ray's provider of fake nodes calls the head."""


class Cluster:
    """One head node, with token authentication; further nodes come and go by Ray's autoscaler, if there may be any.

    Args:
        cpus: The head's logical cores.
        env: Added to its environment, which all its workers inherit.
        gpu_nodes: How many nodes with a logical GPU there may be, beside the head.
    """

    def __init__(self, cpus: int = 4, env: Mapping[str, str] | None = None, gpu_nodes: int = 0) -> None:
        self.processes = MarkedProcesses()
        self.temp_dir = Path("/tmp") / f"bt_ray_{secrets.token_hex(4)}"  # Ray's sockets need a short path
        self.environment = {
            **self.processes.environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **(env or {}),
        }
        port, dashboard_port, agent_port = free_ports(3)
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://127.0.0.1:{dashboard_port}"
        self._agent_url = f"http://127.0.0.1:{agent_port}"
        command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}"]
        command += [f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--temp-dir={self.temp_dir}"]
        command += [f"--dashboard-agent-listen-port={agent_port}"]  # the default is taken where another Ray runs
        if gpu_nodes:
            self.temp_dir.mkdir()
            (self.temp_dir / "autoscaling.json").write_text(json.dumps(autoscaling(self.address, cpus, gpu_nodes)))
            command += [f"--autoscaling-config={self.temp_dir / 'autoscaling.json'}"]
            self.environment |= AUTOSCALER
        self.head = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def await_ready(self) -> None:
        wait_for("the dashboard", lambda: self._answers(f"{self.url}/api/jobs/"))
        wait_for("the node's job agent", lambda: self._answers(f"{self._agent_url}/api/local_raylet_healthz"))

    def _answers(self, url: str) -> bool:
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        try:
            return httpx.get(url, headers=headers, timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    def job(self, *arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", *arguments]
        env = {**self.environment, "RAY_ADDRESS": self.url}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)

    def stop(self) -> None:
        self.head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a test that failed may have left it something to wait for
            self.head.wait(30)
        kill_all(self.processes.all())
        shutil.rmtree(self.temp_dir, ignore_errors=True)


AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    # A node whose raylet is gone is dead after 3 s.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def autoscaling(address: str, cpus: int, gpu_nodes: int) -> dict[str, Any]:
    """The settings of Ray's autoscaler: processes on this machine that are nodes with a logical GPU."""
    return {
        "cluster_name": "fake",
        "max_workers": gpu_nodes,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 2, "GPU": 1, "accelerator_type:L4": 1, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": gpu_nodes,
            },
            "large": {
                "resources": {"CPU": 2, "GPU": 1, "accelerator_type:H100": 1, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 1,
            },
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


PORTS = range(20_000, 32_768)
"""Ray's workers take lower ones. Higher ones are those of outgoing connections, which take one at any moment."""


def free_ports(count: int) -> list[int]:
    """Ray wants numbers: ports that were free a moment ago, and that nobody takes unless it asks for just these."""
    found: list[int] = []
    for port in secrets.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            found.append(port)
        if len(found) == count:
            break
    return found
