"""The owner's side of one vLLM process: its command line and environment, its start, its control routes, and its end."""

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from bt_ray.errors import ServerError
from bt_ray.models import Endpoint
from bt_ray.settings.config import ServerConfig
from bt_ray.slot.arithmetic import cpu_arithmetic
from bt_ray.slot.child import ChildProcess, child_environment, open_port
from bt_ray.slot.serving.guard import SERVED_NAME, TOKEN_VARIABLE
from bt_ray.weights import Weights

POLL_S = 0.1
CONTROL_S = 600.0
"""Seconds that a control route may take: loading a large checkpoint."""
END_TOLD_S = 2.0
"""Seconds to wait for the news that a process has ended, after its connections have closed."""
LONGEST_SOCKET_FOLDER = 60
"""Characters of a folder in which vLLM may make sockets, whose whole path must have fewer than 108."""
GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's own default, of which servers that share a GPU get their share each."""
logger = logging.getLogger(__name__)


class ServerProcess:
    """A vLLM process, until it is stopped or dies. It answers no prompt until it is opened.

    Args:
        weights: The weights that it starts with.
        config: `[server]`.
        dtype: The data type of the computation; None: vLLM chooses.
        token: The bearer token that every request needs.
        host: The address to listen on.
        log_file: Where vLLM's output is appended.
        temporary: A folder for its temporary files.
        port: The port to listen on; 0 for a free one.

    Attributes:
        weights: The checkpoint that is loaded.
        adapters: The adapters that are loaded on it, by id, the most recently requested last.
        is_open: Whether prompts are answered.
    """

    def __init__(
        self,
        weights: Weights,
        config: ServerConfig,
        *,
        dtype: str | None,
        token: str,
        host: str,
        log_file: Path,
        temporary: Path,
        port: int = 0,
    ) -> None:
        self.weights = weights
        self.adapters: dict[str, Weights] = {}
        self.is_open = False
        self._stopped = False
        self._timeout_s = config.start_timeout_s
        self._drain_s = config.drain_timeout_s
        self._token = token
        listening, port = open_port(host, port)
        with listening:
            self._process = ChildProcess(
                server_command(weights, config, dtype, listening.fileno()),
                env=server_environment(config, token, temporary),
                log_file=log_file,
                passed_socket=listening,
            )
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._client = httpx.Client(base_url=self._url, headers=self.endpoint(weights).headers, trust_env=False)

    def endpoint(self, weights: Weights) -> Endpoint:
        """Where weights that are loaded answer."""
        return Endpoint(self._url, weights.id, self._token)

    def has(self, weights: Weights) -> bool:
        """Whether these weights are loaded."""
        return weights.id == self.weights.id or weights.id in self.adapters

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
            return self._client.get("/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Refuse prompts from now on, and return when none is under way.

        Raises:
            ServerError: By this and all others that ask the server for something: it did not answer, or says why not.
        """
        self.is_open = False
        self._control("close", self._drain_s + 30, drain_s=self._drain_s)

    def load(self, weights: Weights) -> None:
        """Load the checkpoint of loadable weights in place of what is loaded. The server is closed."""
        self._control("load", path=weights.path)
        self.weights = weights

    def load_adapter(self, weights: Weights) -> None:
        """Load a loadable adapter beside what is loaded. The server is closed."""
        self._control("load_adapter", name=weights.id, path=weights.path)
        self.adapters[weights.id] = weights

    def drop_adapter(self, weights_id: str) -> None:
        """Forget an adapter. The server is closed."""
        self._control("drop_adapter", name=weights_id)
        del self.adapters[weights_id]

    def logprobs(self, weights_id: str, sequences: Sequence[Sequence[int]]) -> tuple[list[list[float]], str]:
        """Of each token but the first, for each sequence, and the platform that they hold for. The server is closed."""
        adapter = weights_id if weights_id in self.adapters else None
        answer = self._control("canary", adapter=adapter, sequences=sequences)
        return answer["logprobs"], answer["platform"]

    def open(self) -> None:
        """Answer prompts for the weights that are loaded."""
        self._control("open", serving={self.weights.id: SERVED_NAME, **{name: name for name in self.adapters}})
        self.is_open = True

    def sleep(self) -> None:
        """Free the accelerator's memory. The server is closed."""
        self._control("sleep")

    def wake(self) -> None:
        """Take it back."""
        self._control("wake")

    def probe(self, timeout_s: float) -> None:
        """Return when the engine has given a token."""
        self._control("probe", timeout_s)

    def under_way(self, timeout_s: float) -> tuple[int, int]:
        """Prompts that are under way, and that were answered so far."""
        try:
            answer = self._client.get("/bt_ray/status", timeout=timeout_s)
            answer.raise_for_status()
            return answer.json()["in_flight"], answer.json()["answered"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise ServerError(f"The server says nothing of itself: {type(error).__name__}: {error}") from error

    def _control(self, route: str, timeout_s: float = CONTROL_S, **body: Any) -> dict[str, Any]:
        try:
            answer = self._client.post(f"/bt_ray/{route}", json=body, timeout=timeout_s)
            value: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{route}: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise ServerError(f"{route}: {value.get('error', {}).get('message', answer.text)}")
        return value

    @property
    def alive(self) -> bool:
        """Whether it runs, and nobody is ending it."""
        return self._process.alive and not self._stopped

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log_file(self) -> Path:
        return self._process.log_file

    @property
    def end(self) -> str:
        """How the process ended, with its last log lines."""
        if self._stopped:
            return "It was stopped."
        return f"It ended with status {self._process.returncode}. Its last lines:\n{self._process.log_tail()}"

    def failure(self, error: ServerError) -> str:
        """Why the server did not answer: its end, if that is what closed the connection; else that it hangs."""
        if self._process.wait(END_TOLD_S) is not None or self._stopped:
            return self.end
        return f"It hangs: {error} Its last lines:\n{self._process.log_tail()}"

    def stop(self) -> None:
        """End the server and all its processes. Harmless when it is gone already."""
        self._stopped = True
        self._process.stop()


def server_dtype(config: ServerConfig) -> str | None:
    """What a server on this node computes in: as written, else on CPU what the processor is fast in. None: vLLM chooses.

    Raises:
        ServerError: The processor's arithmetic could not be measured.
    """
    written = config.engine_options.get("dtype", "auto")
    if written != "auto":
        return str(written)
    if config.gpus or config.command:
        return None
    arithmetic = cpu_arithmetic(config.env)
    logger.info("On CPU, a server here computes in %s", arithmetic)
    return arithmetic.dtype


def server_command(weights: Weights, config: ServerConfig, dtype: str | None, listen_fd: int) -> list[str]:
    """The command line: no secret is in it."""
    import sys

    program = list(config.command or (sys.executable, "-m", "bt_ray.slot.serving.vllm_main"))
    options: dict[str, Any] = {
        "model": weights.path,
        "served_model_name": SERVED_NAME,
        "middleware": "bt_ray.slot.serving.guard.Guard",
        "disable_uvicorn_access_log": True,
    }
    if config.adapters:
        options |= {"enable_lora": True, "max_loras": config.max_loras, "max_lora_rank": config.max_lora_rank}
    if config.gpus > 1:
        options["tensor_parallel_size"] = int(config.gpus)
    if config.server_while_training == "sleep":
        options["enable_sleep_mode"] = True
    if 0 < config.gpus < 1:
        options["gpu_memory_utilization"] = round(GPU_MEMORY_UTILIZATION * config.gpus, 3)
    if config.gpus == 0:
        options["enforce_eager"] = True  # torch.compile costs a minute of start for a tenth more throughput on CPU
    options |= config.engine_options
    if weights.revision is not None:
        options["revision"] = weights.revision
    if dtype is not None:
        options["dtype"] = dtype
    return [*program, str(listen_fd), *_as_arguments(options)]


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


def server_environment(config: ServerConfig, token: str, temporary: Path) -> dict[str, str]:
    env = {**child_environment(), TOKEN_VARIABLE: token, "VLLM_API_KEY": token, "TMPDIR": str(temporary)}
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    if len(str(temporary)) > LONGEST_SOCKET_FOLDER:
        env.setdefault("VLLM_RPC_BASE_PATH", tempfile.gettempdir())
    if config.gpus == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""
        env["OMP_NUM_THREADS"] = str(config.compute_threads)
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else two servers bind to the same cores
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a process less, which starts sooner and answers no slower
        options = config.engine_options
        if options.get("enforce_eager", not options.get("no_enforce_eager", False)):
            # Else vLLM compiles a helper of log-probabilities in the first canary of each server: 18 s of CPU time.
            env.setdefault("TORCH_COMPILE_DISABLE", "1")
    return {**env, **config.env}
