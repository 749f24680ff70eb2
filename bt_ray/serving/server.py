"""The owner's side of one vLLM process: its command line and environment, its start, and its end."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from bt_ray.child import ChildProcess, child_environment, open_port
from bt_ray.config import ServerConfig
from bt_ray.errors import ServerError
from bt_ray.serving.guard import SERVED_NAME, TOKEN_VARIABLE, WEIGHTS_VARIABLE
from bt_ray.weights import Weights

POLL_S = 0.1
GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's own default, of which servers that share a GPU get their share each."""


@dataclass(frozen=True)
class Endpoint:
    """Where requests for one version of a model are answered, and with which token."""

    url: str
    weights_id: str
    token: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


class ServerProcess:
    """A vLLM process that serves one version of a model until it is stopped or dies.

    Args:
        weights: What to serve.
        config: `[server]`.
        token: What every request must bear.
        host: The address to listen on.
        log_file: Where vLLM's output is appended.
    """

    def __init__(self, weights: Weights, config: ServerConfig, *, token: str, host: str, log_file: Path) -> None:
        self.weights = weights
        self._timeout_s = config.start_timeout_s
        listening, port = open_port(host)
        with listening:
            self._process = ChildProcess(
                server_command(weights, config, listening.fileno()),
                env=server_environment(weights, config, token),
                log_file=log_file,
                passed_socket=listening,
            )
        shown = f"[{host}]" if ":" in host else host
        self.endpoint = Endpoint(f"http://{shown}:{port}", weights.id, token)

    def wait_until_healthy(self) -> Self:
        """Return when the server answers.

        Raises:
            ServerError: It died, with its last log lines, or took longer than `server.start_timeout_s`. It is stopped.
        """
        deadline = time.monotonic() + self._timeout_s
        while not self.healthy():
            if not self._process.alive or time.monotonic() > deadline:
                died = not self._process.alive
                self.stop()
                how = f"ended with status {self._process.returncode}" if died else f"is not up after {self._timeout_s:.0f} s"
                raise ServerError(
                    f"The server for weights {self.weights.id} {how}. Its last lines ({self._process.log_file}):\n"
                    f"{self._process.log_tail()}"
                )
            time.sleep(POLL_S)
        return self

    def healthy(self) -> bool:
        """Whether the server answers its health route now."""
        try:
            answer = httpx.get(f"{self.endpoint.url}/health", headers=self.endpoint.headers, timeout=10, trust_env=False)
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    @property
    def alive(self) -> bool:
        return self._process.alive

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """End the server and all its processes. Harmless when it is gone already."""
        self._process.stop()


def server_command(weights: Weights, config: ServerConfig, listen_fd: int) -> list[str]:
    """The command line: no secret is in it."""
    import sys

    program = list(config.command or (sys.executable, "-m", "bt_ray.serving.vllm_main"))
    options: dict[str, Any] = {
        "model": weights.path,
        "served_model_name": SERVED_NAME,
        "middleware": "bt_ray.serving.guard.Guard",
        "disable_uvicorn_access_log": True,
    }
    if config.gpus > 1:
        options["tensor_parallel_size"] = int(config.gpus)
    if 0 < config.gpus < 1:
        options["gpu_memory_utilization"] = round(GPU_MEMORY_UTILIZATION * config.gpus, 3)
    if config.gpus == 0:
        options["enforce_eager"] = True  # torch.compile costs a minute of start for a tenth more throughput on CPU
    return [*program, str(listen_fd), *_as_arguments({**options, **config.engine_options})]


def _as_arguments(options: Mapping[str, Any]) -> list[str]:
    arguments: list[str] = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if value is True:
            arguments.append(f"--{flag}")
        elif value is False:
            arguments.append(f"--no-{flag}")
        elif isinstance(value, dict):
            arguments += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, list | tuple):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


def server_environment(weights: Weights, config: ServerConfig, token: str) -> dict[str, str]:
    env = {**child_environment(), TOKEN_VARIABLE: token, WEIGHTS_VARIABLE: weights.id, "VLLM_API_KEY": token}
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.gpus == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""
        env["OMP_NUM_THREADS"] = str(config.compute_threads)
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else two servers bind to the same cores
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    return {**env, **config.env}
