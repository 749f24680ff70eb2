"""A Ray head node in processes of its own, as `ray start --head` makes it."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from support.processes import MarkedProcesses, wait_for

RAY = str(Path(sys.executable).with_name("ray"))


class Cluster:
    """One head node, with token authentication.

    Args:
        cpus: Its logical cores.
        env: Added to its environment, which all its workers inherit.
    """

    def __init__(self, cpus: int = 4, env: Mapping[str, str] | None = None) -> None:
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
        command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}"]
        command += [f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--temp-dir={self.temp_dir}"]
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
        with contextlib.suppress(subprocess.TimeoutExpired):  # a test that failed may have left it something to wait for
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
