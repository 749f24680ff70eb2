"""`Models` on one slot of this process: what `bt_ray.load` answers with."""

import atexit
import secrets
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bt_ray.config import ServerConfig
from bt_ray.errors import TaskError
from bt_ray.hosting import Conversation
from bt_ray.serving.server import Endpoint
from bt_ray.slot import Slot
from bt_ray.storage import Storage
from bt_ray.weights import Weights


class LocalModels:
    """Serves given weights one at a time, each on its first request, until killed or until this process ends.

    Args:
        weights: All that can be asked for, by id.
        config: `[server]`.
        storage: The run directory that fine-tuned weights belong to.
    """

    def __init__(self, weights: dict[str, Weights], config: ServerConfig, storage: Storage) -> None:
        self._weights = weights
        token = secrets.token_urlsafe(32)
        self._slot = Slot("load", config, token=token, host="127.0.0.1", storage=storage, keeps_records=False)
        self._endpoint: Endpoint | None = None
        self._in_flight = 0
        self._door = threading.Lock()
        self._changed = threading.Condition()
        # Whatever happens, the keeper ends the server with this process; this stops it as soon as nothing can ask.
        weakref.finalize(self, self._slot.close)
        atexit.register(self._slot.close)

    @contextmanager
    def request(self, weights_id: str) -> Iterator[Endpoint]:
        with self._door:
            if self._endpoint is None or self._endpoint.weights_id != weights_id:
                with self._changed:
                    self._changed.wait_for(lambda: self._in_flight == 0)
                self._endpoint = self._slot.serve(self._weights[weights_id])
            endpoint = self._endpoint
            with self._changed:
                self._in_flight += 1
        try:
            yield endpoint
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def lost(self, endpoint: Endpoint) -> None:
        if self._endpoint == endpoint:
            self._endpoint = None

    def refused(self, endpoint: Endpoint) -> None:
        self.lost(endpoint)

    def kill(self, weights_id: str) -> None:
        """Stop the server; the next request starts it again."""
        self._endpoint = None
        self._slot.stop()

    def add(self, weights: Weights) -> None:
        self._weights[weights.id] = weights

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        raise TaskError("A loaded program is for use. To fine-tune it, run a sweep.")
