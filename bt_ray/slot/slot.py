"""One slot: some GPUs, or some CPU cores, for one model: it serves, or it trains.

A server goes to other weights of the same architecture in place, or takes adapters beside its base, and answers nothing
before it is seen to answer as those do; whatever fails falls back to a start. On CPU it stays up, closed, while the slot
trains.

Without Ray. `bt_ray.pool.model_server` puts a slot into an actor; `bt_ray.load` uses one directly.
"""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bt_ray.errors import BtRayError, ServerError, StorageError, TrainingError
from bt_ray.layout import LOGS
from bt_ray.models import Endpoint
from bt_ray.run_dir.node_disk import Scratch
from bt_ray.run_dir.storage import Storage
from bt_ray.settings.config import ServerConfig, TrainConfig
from bt_ray.slot.canary_store import KnownAnswers, Unverified, expects_swap
from bt_ray.slot.child import ChildProcess, child_environment
from bt_ray.slot.node_weights import NodeWeights
from bt_ray.slot.serving.checkpoint import Layout, checkpoint_folder, layout_difference, read_layout
from bt_ray.slot.serving.server import ServerProcess, server_dtype
from bt_ray.slot.serving.watch import Watch
from bt_ray.slot.training.attempts import Attempt, Trainings
from bt_ray.slot.training.job import TrainJob, finish_training, read_progress, start_training, training_dtype, training_key
from bt_ray.weights import Weights, new_weights_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlotStatus:
    """What a slot is doing.

    Attributes:
        state: `"idle"`, `"starting"`, `"swapping"`, `"serving"`, `"training"`, `"stopping"` or `"dead"`.
        weights_id: Of the weights served, or in training; None when idle.
        since: Unix time in seconds.
        detail: Progress of a training: `"step 12/40, loss 0.13"`; why a server is dead.
        pid: Of the model process, None when there is none.
    """

    state: str = "idle"
    weights_id: str | None = None
    since: float = 0.0
    detail: str = ""
    pid: int | None = None


@dataclass(frozen=True)
class Change:
    """How a slot came to serve something.

    Attributes:
        how: `"start"`, `"swap"`, `"reopened"` (it served that before, and was closed for a training) or `"kept"`.
        seconds: What it took.
        reason: Why a start was needed although a server was there, else empty.
    """

    how: str
    seconds: float
    reason: str = ""


class Slot:
    """Owns one model at a time. `serve` and `train` may be called from any thread, one at a time runs.

    Args:
        name: Names the slot in logs and files.
        config: `[server]`.
        token: What every request to the slot's servers must bear.
        host: The address that servers listen on.
        storage: The run directory that fine-tuned weights belong to.
        keeps_records: Whether the servers' output, and what they answer, is kept there.
        port: The port that servers listen on; 0 for a free one each.

    Attributes:
        change: How it came to serve what it serves.
    """

    def __init__(
        self,
        name: str,
        config: ServerConfig,
        *,
        token: str,
        host: str,
        storage: Storage,
        keeps_records: bool = True,
        port: int = 0,
    ) -> None:
        self.name = name
        self.change = Change("kept", 0.0)
        self._config = config
        self._token = token
        self._host = host
        self._port = port
        self._scratch = Scratch(name)
        self._logs = _Logs(storage if keeps_records else None, self._scratch.folder)
        self._weights = NodeWeights(storage, self._scratch.folder)
        self._trainings = Trainings(storage, self._weights, self._scratch.folder)
        self._answers = KnownAnswers(storage, keeps=keeps_records)
        self._loaded = ExitStack()
        """Keeps what is served loadable."""
        self._turn = threading.Lock()
        self._door = threading.Lock()
        """Held while a process is being started, so that `stop` either sees it or forestalls it."""
        self._stops = 0
        self._server: ServerProcess | None = None
        self._layout: Layout | None = None
        """The tensors of the checkpoint that the server was started on."""
        self._asleep = False
        self._training: tuple[TrainJob, ChildProcess] | None = None
        self._status = SlotStatus(since=time.time())
        self._watch: Watch | None = None

    def serve(self, weights: Weights, beside: Sequence[Weights] = ()) -> Endpoint:
        """Serve `weights`, and return where.

        Args:
            weights: What is to be served.
            beside: What is to be served as well: the base of adapters, and other adapters on it.

        Raises:
            ServerError: The server did not start, does not answer as these weights do, or `stop` was called meanwhile.
            StorageError: The weights cannot be read, or are damaged.
        """
        stops, began = self._stops, time.monotonic()
        wanted = [weights, *beside]
        with self._turn:
            how, reason = self._how(wanted)
            if how == "swap":
                try:
                    self._swap(wanted)
                except BtRayError as error:
                    how, reason = "start", f"A swap to {weights.id} failed: {error}"
                    logger.warning("Slot %s: %s", self.name, reason)
            if how == "start":
                self._stop_server()
                self._start(wanted, stops)
            assert self._server is not None
            if how == "reopened":
                self._server.open()
            if how != "kept":
                self.change = Change(how, time.monotonic() - began, reason)
                self._enter("serving", weights.id, pid=self._server.pid)
                self._watch_server()
            else:
                self.change = Change(how, time.monotonic() - began)
            return self._server.endpoint(weights)

    def fetch(self, weights: Weights) -> None:
        """Copy weights to this node, for a `serve` or a `train` to come. Waits for nothing that the slot does.

        Raises:
            StorageError: They cannot be had.
        """
        with self._weights.loadable(weights):
            pass

    def _how(self, wanted: Sequence[Weights]) -> tuple[str, str]:
        """What it takes to serve these weights, and why more than a swap where a server is there."""
        server = self._server
        if server is None:
            return "start", ""
        seen = self._watch.reason if self._watch is not None else ""
        if seen or not server.alive:
            return "start", seen or server.end
        try:
            if self._asleep:
                server.wake()
                self._asleep = False
            server.probe(self._config.stall_timeout_s)
        except ServerError as error:
            return "start", server.failure(error)
        missing = [weights for weights in wanted if not server.has(weights)]
        if not missing:
            return ("kept" if server.is_open else "reopened"), ""
        if server.weights.base != missing[0].base or (self._config.adapters and missing[0].on is None):
            return "start", "It served another model."
        return "swap", ""

    def _swap(self, wanted: Sequence[Weights]) -> None:
        """Bring the server to weights that it lacks, in place; it answers nothing until it is seen to have them."""
        server = self._server
        assert server is not None
        with ExitStack() as opened:
            lacking = [weights for weights in wanted if not server.has(weights)]
            missing = [opened.enter_context(self._weights.loadable(weights)) for weights in lacking]
            if self._config.adapters:
                self._add_adapters(server, missing, {weights.id for weights in wanted})
            else:
                self._replace_checkpoint(server, *missing)
                self._loaded.close()
            server.open()
            self._loaded.push(opened.pop_all())

    def _replace_checkpoint(self, server: ServerProcess, weights: Weights) -> None:
        expected = self._answers.expect(weights, self._dtype)
        if not expects_swap(expected):
            raise Unverified("nothing tells yet how these weights answer")
        folder = checkpoint_folder(weights)
        if folder is None or self._layout is None:
            raise ServerError("the checkpoints cannot be compared, since one is not on this machine's disk")
        if (different := layout_difference(read_layout(folder), self._layout)) is not None:
            raise ServerError(f"{folder} does not fit the model: {different}")
        self._close_server(server, weights)
        server.load(replace(weights, path=str(folder)))
        self._answers.check_swapped(server, expected)

    def _add_adapters(self, server: ServerProcess, adapters: Sequence[Weights], wanted: set[str]) -> None:
        """Load adapters; where there is no room for them, those go that are not wanted, the oldest first."""
        for weights in adapters:
            self._weights.check(weights)
        self._close_server(server, adapters[0])
        surplus = len(server.adapters) + len(adapters) - self._config.adapters
        for old in [name for name in server.adapters if name not in wanted][: max(0, surplus)]:
            server.drop_adapter(old)
        for weights in adapters:
            server.load_adapter(weights)
            expected = self._answers.expect(weights, self._dtype)
            # What nothing tells of yet would be loaded by a server that was started for it in the same way.
            check = self._answers.check_swapped if expects_swap(expected) else self._answers.check_fresh
            check(server, expected)

    def _close_server(self, server: ServerProcess, weights: Weights) -> None:
        self._enter("swapping", weights.id, pid=server.pid)
        self._end_watch()
        server.close()

    def _start(self, wanted: Sequence[Weights], stops: int) -> None:
        """Start a server on weights whose files are seen to be whole."""
        checkpoint = wanted[0].on or wanted[0]
        self._enter("starting", wanted[0].id)
        try:
            loadable = self._loadable_and_whole(checkpoint)
            expected = self._answers.expect(loadable, self._dtype)
            folder = checkpoint_folder(loadable)
            self._layout = read_layout(folder) if folder is not None and any(folder.glob("*.safetensors")) else None
            log_file, temporary = self._logs.file(self._log_name(checkpoint)), self._scratch.folder / "tmp"
            temporary.mkdir(exist_ok=True)
            with self._door:
                self._refuse_stopped(stops)
                self._server = ServerProcess(
                    loadable,
                    self._config,
                    dtype=self._dtype,
                    token=self._token,
                    host=self._host,
                    log_file=log_file,
                    temporary=temporary,
                    port=self._port,
                )
            self._status = replace(self._status, pid=self._server.pid)
            self._server.wait_until_healthy()
            self._answers.check_fresh(self._server, expected)
            for weights in wanted:
                if weights.on is not None:
                    adapter = self._loadable_and_whole(weights)
                    self._server.load_adapter(adapter)
                    self._answers.check_fresh(self._server, self._answers.expect(adapter, self._dtype))
            self._server.open()
        except BaseException:
            self._stop_server()
            raise

    @cached_property
    def _dtype(self) -> str | None:
        """What the slot's servers compute in; None: vLLM chooses."""
        return server_dtype(self._config)

    def _loadable_and_whole(self, weights: Weights) -> Weights:
        loadable = self._loaded.enter_context(self._weights.loadable(weights))
        self._weights.check(loadable)
        return loadable

    def train(self, parent: Weights, conversations: Sequence[dict[str, Any]], config: TrainConfig, *, seed: int) -> Weights:
        """Train new weights in this slot. Its server answers nothing meanwhile; `server.while_training` says what it does.

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
        key = training_key(parent, conversations, config, seed, adapter=self._config.adapters > 0)
        if (finished := self._find_finished(key)) is not None:
            return finished
        with self._turn:
            if (finished := self._find_finished(key)) is not None:  # in the turn before this one
                return finished
            self._make_way()
            attempt = self._trainings.attempt(key, new_weights_id(parent))
            try:
                with self._weights.loadable(parent) as loadable:
                    job = self._job(loadable, attempt, len(conversations), config, seed)
                    self._run(job, conversations, attempt, stops)
                return attempt.finish()
            finally:
                attempt.close()

    def _find_finished(self, key: str) -> Weights | None:
        """The weights of a training that finished before, if they are as it left them. Else they are trained again."""
        finished = self._trainings.find_finished(key)
        if finished is None:
            return None
        try:
            with self._weights.loadable(finished) as loadable:
                self._weights.check(loadable)
        except StorageError as error:
            logger.warning("Slot %s: %s They are trained again.", self.name, error)
            return None
        return finished

    def _make_way(self) -> None:
        """Close the server for a training, and have it do what the settings say."""
        what, server = self._config.server_while_training, self._server
        if server is None or what == "stop" or not server.alive:
            self._stop_server()
            return
        try:
            self._end_watch()
            server.close()
            if what == "sleep":
                server.sleep()
                self._asleep = True
        except ServerError as error:
            logger.warning("Slot %s: the server is stopped for a training: %s", self.name, error)
            self._stop_server()

    def _job(self, parent: Weights, attempt: Attempt, conversations: int, config: TrainConfig, seed: int) -> TrainJob:
        return TrainJob(
            parent=parent,
            weights_id=attempt.weights_id,
            folder=str(attempt.folder),
            output_dir=str(attempt.output),
            adapter=self._config.adapters > 0,
            checkpoint=None if attempt.checkpoint is None else str(attempt.checkpoint),
            conversations=conversations,
            config=config,
            dtype=training_dtype(self._config, config),
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
            self._enter("idle", None, pid=self._server.pid if self._server is not None else None)

    def stop(self) -> None:
        """End whatever runs, starts or waits for its turn; it raises where it was waited for. Harmless when nothing does."""
        with self._door:
            self._stops += 1
            server, training, watch = self._server, self._training, self._watch
        if watch is not None:
            watch.end()  # it would take the server for dead
        if training is not None:
            training[1].stop()
        if server is not None:
            server.stop()
        with self._turn:
            if self._server is server:  # else another was started since
                self._stop_server()

    def close(self) -> None:
        """End whatever runs, for good, and leave nothing on the node's disk."""
        self.stop()
        with self._turn:
            self._stop_server()
        self._scratch.remove()

    def status(self) -> SlotStatus:
        training, watch = self._training, self._watch
        if training is None:
            if watch is not None and watch.reason:
                return replace(self._status, state="dead", detail=watch.reason.partition("\n")[0])
            return self._status
        lines = list(read_progress(training[0].progress_file))
        detail = "step {step}/{steps}, loss {loss:.3g}".format(**lines[-1]) if lines else "loading"
        return replace(self._status, detail=detail)

    def _log_name(self, weights: Weights) -> str:
        return f"{self.name}-{weights.id}.log"

    def _refuse_stopped(self, stops: int) -> None:
        if stops != self._stops:
            raise ServerError(f"Slot {self.name} was stopped before this began.")

    def _watch_server(self) -> None:
        self._end_watch()
        assert self._server is not None
        self._watch = Watch(self._server, self._config.stall_timeout_s)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _stop_server(self) -> None:
        self._end_watch()
        self._asleep = False
        server, self._server = self._server, None
        if server is not None:
            self._enter("stopping", server.weights.id, pid=server.pid)
            server.stop()
            self._logs.keep(server.log_file.name)
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
