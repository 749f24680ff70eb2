"""`Models` in this process, on this machine: what `bt_ray.load` answers with."""

import atexit
import secrets
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakValueDictionary

from bt_ray.errors import TaskError
from bt_ray.models import Conversation, Endpoint
from bt_ray.run_dir.storage import Storage
from bt_ray.settings.config import ServerConfig
from bt_ray.slot.slot import Slot
from bt_ray.weights import Weights

_opened: "WeakValueDictionary[tuple[str, str], LocalModels]" = WeakValueDictionary()
_opening = threading.Lock()


def open_local_models(weights: Mapping[str, Weights], config: ServerConfig, storage: Storage) -> "LocalModels":
    """Who serves the weights of a run directory in this process: one for all programs from it, while one of them is used."""
    with _opening:
        which = (storage.location, config.model_dump_json())
        models = _opened.get(which)
        if models is None:
            models = _opened[which] = LocalModels({}, config, storage)
        for one in weights.values():
            models.add(one)
        return models


class LocalModels:
    """Serves given weights, each on its first request, until killed or until this process ends.

    Each base model has a slot of its own, which serves one version of it at a time.

    Args:
        weights: All that can be asked for, by id.
        config: `[server]`.
        storage: The run directory that fine-tuned weights belong to.
    """

    def __init__(self, weights: dict[str, Weights], config: ServerConfig, storage: Storage) -> None:
        self._weights = weights
        self._server_config = config
        self._storage = storage
        self._door = threading.Lock()
        self._servers: dict[str, _Server] = {}
        # Whatever happens, the keeper ends the servers with this process; this stops them as soon as nothing can ask.
        weakref.finalize(self, _close_all, self._servers)
        atexit.register(_close_all, self._servers)

    def request(self, weights_id: str) -> AbstractContextManager[Endpoint]:
        weights = self._weights[weights_id]
        return self.server(weights).request(weights)

    def server(self, weights: Weights) -> "_Server":
        """The one for all versions of their base model."""
        with self._door:
            if weights.base not in self._servers:
                name = "load" if not self._servers else f"load-{len(self._servers) + 1}"
                self._servers[weights.base] = _Server(name, self._server_config.of(weights.model), self._storage)
            return self._servers[weights.base]

    def report_loss(self, endpoint: Endpoint) -> None:
        self.server(self._weights[endpoint.weights_id]).report_loss(endpoint)

    def report_refusal(self, endpoint: Endpoint) -> None:
        self.report_loss(endpoint)

    def kill(self, weights_id: str) -> None:
        """Stop the server; the next request starts it again."""
        if (weights := self._weights.get(weights_id)) is not None:
            self.server(weights).stop()

    def close(self) -> None:
        """Stop all servers."""
        _close_all(self._servers)

    def add(self, weights: Weights) -> None:
        self._weights[weights.id] = weights

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        raise TaskError("A loaded program is for use. To fine-tune it, run a sweep.")


class _Server:
    """One slot, and the requests under way on it."""

    def __init__(self, name: str, config: ServerConfig, storage: Storage) -> None:
        token = secrets.token_urlsafe(32)
        self.slot = Slot(name, config, token=token, host="127.0.0.1", storage=storage, keeps_records=False)
        self._endpoint: Endpoint | None = None
        self._in_flight = 0
        self._door = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def request(self, weights: Weights) -> Iterator[Endpoint]:
        with self._door:
            if self._endpoint is None or self._endpoint.weights_id != weights.id:
                with self._changed:
                    self._changed.wait_for(lambda: self._in_flight == 0)
                self._endpoint = self.slot.serve(weights)
            endpoint = self._endpoint
            with self._changed:
                self._in_flight += 1
        try:
            yield endpoint
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def report_loss(self, endpoint: Endpoint) -> None:
        if self._endpoint == endpoint:
            self._endpoint = None

    def forget(self) -> None:
        """Look anew at the next request: the slot did something else meanwhile."""
        self._endpoint = None

    def stop(self) -> None:
        self.slot.stop()
        self._endpoint = None  # last: who looks anew now is served by another server


def _close_all(servers: dict[str, _Server]) -> None:
    for server in servers.values():
        server.slot.close()
