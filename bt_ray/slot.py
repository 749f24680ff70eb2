"""One slot: some GPUs, or some CPU cores, and at most one model process in it: a server, or a training.

Without Ray. `bt_ray.actors.model_server` puts a slot into an actor; `bt_ray.load` uses one directly.
"""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bt_ray.child import ChildProcess, child_environment
from bt_ray.config import ServerConfig, TrainConfig
from bt_ray.errors import ServerError
from bt_ray.serving.server import Endpoint, ServerProcess
from bt_ray.training.job import TrainJob, finish_training, read_progress, start_training
from bt_ray.weights import Weights


@dataclass(frozen=True)
class SlotStatus:
    """What a slot is doing.

    Attributes:
        state: `"idle"`, `"starting"`, `"serving"`, `"training"` or `"stopping"`.
        weights_id: Of the weights served, or in training; None when idle.
        since: Unix time in seconds.
        detail: Progress of a training: `"step 12/40, loss 0.13"`.
        pid: Of the model process, None when there is none.
    """

    state: str = "idle"
    weights_id: str | None = None
    since: float = 0.0
    detail: str = ""
    pid: int | None = None


class Slot:
    """Owns one model process at a time. `serve` and `train` may be called from any thread, one at a time runs.

    Args:
        name: Names the slot in logs and files.
        config: `[server]`.
        token: What every request to the slot's servers must bear.
        host: The address that servers listen on.
        log_dir: Where the processes' output is kept.
    """

    def __init__(self, name: str, config: ServerConfig, *, token: str, host: str, log_dir: Path) -> None:
        self.name = name
        self._config = config
        self._token = token
        self._host = host
        self._log_dir = log_dir
        self._turn = threading.Lock()
        self._door = threading.Lock()
        """Held while a process is being started, so that `stop` either sees it or forestalls it."""
        self._stops = 0
        self._server: ServerProcess | None = None
        self._training: tuple[TrainJob, ChildProcess] | None = None
        self._status = SlotStatus(since=time.time())

    def serve(self, weights: Weights) -> Endpoint:
        """Serve `weights`, and return where. A healthy server of these weights is kept, any other is replaced.

        Raises:
            ServerError: The server did not start, or `stop` was called meanwhile.
        """
        stops = self._stops
        with self._turn:
            if self._server is not None:
                if self._server.weights.id == weights.id and self._server.alive and self._server.healthy():
                    return self._server.endpoint
                self._stop_server()
            self._enter("starting", weights.id)
            try:
                log_file = self._log_dir / f"{self.name}-{weights.id}.log"
                with self._door:
                    self._refuse_stopped(stops)
                    self._server = ServerProcess(
                        weights, self._config, token=self._token, host=self._host, log_file=log_file
                    )
                self._status = replace(self._status, pid=self._server.pid)
                self._server.wait_until_healthy()
            except BaseException:
                self._stop_server()
                raise
            self._enter("serving", weights.id, pid=self._server.pid)
            return self._server.endpoint

    def train(
        self,
        parent: Weights,
        weights_id: str,
        conversations: Sequence[dict[str, Any]],
        config: TrainConfig,
        *,
        seed: int,
        output_dir: Path,
    ) -> Weights:
        """Train new weights in this slot; its server is stopped for it.

        Args:
            parent: The weights to start from.
            weights_id: The id of the result.
            conversations: `{"messages": [...]}` each, the last message is what to learn.
            config: `[train]`.
            seed: For the order of the data and the initial adapter.
            output_dir: The folder for the result. Job, data, log and progress go beside it.

        Raises:
            TrainingError: The training died or took too long, or `stop` was called meanwhile.
            TaskError: The data or the settings cannot be trained on.
        """
        stops = self._stops
        with self._turn:
            self._stop_server()
            data_file = Path(f"{output_dir}.data.jsonl")
            data_file.parent.mkdir(parents=True, exist_ok=True)
            data_file.write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
            job = TrainJob(
                parent=parent,
                weights_id=weights_id,
                output_dir=str(output_dir),
                data_file=str(data_file),
                conversations=len(conversations),
                progress_file=f"{output_dir}.progress.jsonl",
                config=config,
                seed=seed,
                gpus=int(self._config.gpus),
                threads=self._config.compute_threads,
            )
            env = {**child_environment(), **self._config.env}
            with self._door:
                self._refuse_stopped(stops)
                process = start_training(job, env, Path(f"{output_dir}.log"))
                self._training = (job, process)
            self._enter("training", weights_id, pid=process.pid)
            try:
                return finish_training(job, process)
            finally:
                self._training = None
                process.stop()
                self._enter("idle", None)

    def stop(self) -> None:
        """End whatever runs, starts or waits for its turn; it raises where it was waited for. Harmless when nothing does."""
        with self._door:
            self._stops += 1
            server, training = self._server, self._training
        if training is not None:
            training[1].stop()
        if server is not None:
            server.stop()
        with self._turn:
            self._stop_server()

    def status(self) -> SlotStatus:
        training = self._training
        if training is None:
            return self._status
        lines = list(read_progress(Path(training[0].progress_file)))
        detail = "step {step}/{steps}, loss {loss:.3g}".format(**lines[-1]) if lines else "loading"
        return replace(self._status, detail=detail)

    def _refuse_stopped(self, stops: int) -> None:
        if stops != self._stops:
            raise ServerError(f"Slot {self.name} was stopped before this began.")

    def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            self._enter("stopping", server.weights.id, pid=server.pid)
            server.stop()
        self._enter("idle", None)

    def _enter(self, state: str, weights_id: str | None, pid: int | None = None) -> None:
        self._status = SlotStatus(state, weights_id, time.time(), pid=pid)
