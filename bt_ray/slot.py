"""One slot: some GPUs, or some CPU cores, and at most one model process in it: a server, or a training.

Without Ray. `bt_ray.actors.model_server` puts a slot into an actor; `bt_ray.load` uses one directly.
"""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bt_ray.child import ChildProcess, child_environment
from bt_ray.config import ServerConfig, TrainConfig
from bt_ray.errors import ServerError, StorageError, TrainingError
from bt_ray.node_disk import Scratch
from bt_ray.node_weights import NodeWeights
from bt_ray.serving.server import Endpoint, ServerProcess
from bt_ray.storage import Storage
from bt_ray.training.job import TrainJob, finish_training, read_progress, start_training, training_key
from bt_ray.trainings import Attempt, Trainings
from bt_ray.weights import Weights, new_weights_id

LOGS = "logs"
logger = logging.getLogger(__name__)


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
        storage: The run directory that fine-tuned weights belong to.
        keep_logs: Whether the servers' output is kept there.
    """

    def __init__(
        self, name: str, config: ServerConfig, *, token: str, host: str, storage: Storage, keep_logs: bool = True
    ) -> None:
        self.name = name
        self._config = config
        self._token = token
        self._host = host
        self._scratch = Scratch(name)
        self._logs = _Logs(storage if keep_logs else None, self._scratch.folder)
        self._weights = NodeWeights(storage, self._scratch.folder)
        self._trainings = Trainings(storage, self._weights, self._scratch.folder)
        self._loaded = ExitStack()
        """Keeps what is served loadable."""
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
                loadable = self._loaded.enter_context(self._weights.loadable(weights))
                log_file = self._logs.file(self._log_name(weights))
                with self._door:
                    self._refuse_stopped(stops)
                    self._server = ServerProcess(
                        loadable, self._config, token=self._token, host=self._host, log_file=log_file
                    )
                self._status = replace(self._status, pid=self._server.pid)
                self._server.wait_until_healthy()
            except BaseException:
                self._stop_server()
                raise
            self._enter("serving", weights.id, pid=self._server.pid)
            return self._server.endpoint

    def train(self, parent: Weights, conversations: Sequence[dict[str, Any]], config: TrainConfig, *, seed: int) -> Weights:
        """Train new weights in this slot; its server is stopped for it.

        A fine-tune that finished before is not repeated, and one that was cut off goes on from its last checkpoint.

        Args:
            parent: The weights to start from.
            conversations: `{"messages": [...]}` each, the last message is what to learn.
            config: `[train]`.
            seed: For the order of the data and the initial adapter.

        Raises:
            TrainingError: The training died or took too long, or `stop` was called meanwhile.
            TaskError: The data or the settings cannot be trained on.
            StorageError: The weights cannot be read or kept.
        """
        stops = self._stops
        key = training_key(parent, conversations, config, seed)
        if (finished := self._trainings.finished(key)) is not None:
            return finished
        with self._turn:
            self._stop_server()
            attempt = self._trainings.attempt(key, new_weights_id(parent))
            try:
                with self._weights.loadable(parent) as loadable:
                    job = self._job(loadable, attempt, len(conversations), config, seed)
                    self._run(job, conversations, attempt, stops)
                return attempt.finish()
            finally:
                attempt.close()

    def _job(self, parent: Weights, attempt: Attempt, conversations: int, config: TrainConfig, seed: int) -> TrainJob:
        return TrainJob(
            parent=parent,
            weights_id=attempt.weights_id,
            folder=str(attempt.folder),
            output_dir=str(attempt.output),
            checkpoint=None if attempt.checkpoint is None else str(attempt.checkpoint),
            conversations=conversations,
            config=config,
            seed=seed,
            gpus=int(self._config.gpus),
            threads=self._config.compute_threads,
        )

    def _run(self, job: TrainJob, conversations: Sequence[dict[str, Any]], attempt: Attempt, stops: int) -> None:
        env = {**child_environment(), **self._config.env}
        began_at = len(list(read_progress(job.progress_file)))
        with self._door:
            self._refuse_stopped(stops)
            process = start_training(job, conversations, env)
            self._training = (job, process)
        self._enter("training", job.weights_id, pid=process.pid)
        try:
            finish_training(job, process, attempt.save)
        except TrainingError:
            if self._stops == stops and len(list(read_progress(job.progress_file))) == began_at:
                attempt.forget_start()
            raise
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

    def close(self) -> None:
        """End whatever runs, for good, and leave nothing on the node's disk."""
        self.stop()
        self._scratch.remove()

    def status(self) -> SlotStatus:
        training = self._training
        if training is None:
            return self._status
        lines = list(read_progress(training[0].progress_file))
        detail = "step {step}/{steps}, loss {loss:.3g}".format(**lines[-1]) if lines else "loading"
        return replace(self._status, detail=detail)

    def _log_name(self, weights: Weights) -> str:
        return f"{self.name}-{weights.id}.log"

    def _refuse_stopped(self, stops: int) -> None:
        if stops != self._stops:
            raise ServerError(f"Slot {self.name} was stopped before this began.")

    def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            self._enter("stopping", server.weights.id, pid=server.pid)
            server.stop()
            self._logs.keep(self._log_name(server.weights))
        self._loaded.close()
        self._enter("idle", None)

    def _enter(self, state: str, weights_id: str | None, pid: int | None = None) -> None:
        self._status = SlotStatus(state, weights_id, time.time(), pid=pid)


class _Logs:
    """Where the output of a slot's servers goes: into the run directory, at their end if that is no filesystem."""

    def __init__(self, storage: Storage | None, scratch: Path) -> None:
        self._storage = storage
        self._folder = scratch / LOGS if storage is None or storage.folder is None else storage.folder / LOGS

    def file(self, name: str) -> Path:
        return self._folder / name

    def keep(self, name: str) -> None:
        if self._storage is None or self._storage.folder is not None:
            return
        try:
            self._storage.write(f"{LOGS}/{name}", self.file(name).read_bytes())
        except (OSError, StorageError) as error:
            logger.warning("The log %s could not be kept: %s", name, error)
