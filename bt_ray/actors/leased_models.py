"""A trial's side of the pool: `Models` on leased servers.

A shared lease is taken by the first request for weights, and given back when no request was under way for a moment, on
`kill()`, before the trial waits for anything else, and by its death. The pool may end it earlier: the guard of the server
then refuses the next request, and the trial asks the pool again.
"""

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.actor import ActorHandle

from bt_ray.actors.calls import ActorGone, ask
from bt_ray.actors.leases import Lease
from bt_ray.actors.liveness import this_actor
from bt_ray.config import SweepConfig, override_train
from bt_ray.errors import ServerError
from bt_ray.hosting import Conversation
from bt_ray.serving.server import Endpoint
from bt_ray.training.job import check_trainable
from bt_ray.weights import Weights

RESTART_S = 60.0
"""Seconds that the pool's actor may take to come back after its process died."""
LINGER_S = 1.0
"""Seconds without a request after which a lease is given back."""
RENEW_S = 60.0
"""Seconds after which a lease is asked for anew: the pool may have grown, and its new servers be free."""


@dataclass
class _Held:
    """A shared lease, and the requests under way on it."""

    lease: Lease
    in_flight: int = 0
    idle_since: float = 0.0
    since: float = field(default_factory=time.monotonic)


class LeasedModels:
    """`bt_ray.hosting.Models` for one trial.

    Args:
        holder: The trial's name.
        pool: The sweep's pool.
        config: The sweep's settings.

    Attributes:
        weights: All weights that are known, by id.
        urgency: Of what leases are asked for, as `bt_ray.placement_state.Ask` has it.
    """

    def __init__(self, holder: str, pool: "ActorHandle[Any]", config: SweepConfig) -> None:
        self._holder = f"{holder}#{secrets.token_hex(4)}"  # a trial that is run again is another holder
        self._pool = pool
        self._config = config
        self.weights: dict[str, Weights] = {}
        self.urgency = 0
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._asking: dict[str, Future[None]] = {}
        self._lost: dict[str, tuple[int, int]] = {}
        """Servers that could not be reached, for the next ask: weights to server and incarnation."""
        self._closed = threading.Event()
        threading.Thread(target=self._give_back_idle, name="give-back-leases", daemon=True).start()

    @contextmanager
    def request(self, weights_id: str) -> Iterator[Endpoint]:
        held = self._take(weights_id)
        assert held.lease.endpoint is not None
        try:
            yield held.lease.endpoint
        finally:
            with self._lock:
                held.in_flight -= 1
                held.idle_since = time.monotonic()

    def lost(self, endpoint: Endpoint) -> None:
        lease = self._drop(endpoint)
        if lease is not None:
            self._lost[endpoint.weights_id] = (lease.server, lease.incarnation)

    def refused(self, endpoint: Endpoint) -> None:
        self._drop(endpoint)

    def kill(self, weights_id: str) -> None:
        """Give the lease back; requests may still come, and take one again."""
        with self._lock:
            held = self._held.pop(weights_id, None)
        if held is not None:
            self._end([held.lease])

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        parent = self.weights[weights_id]
        train = override_train(self._config.train, train_kwargs)
        check_trainable(self._config.server.of(parent.model), train)
        self.give_back()
        lease = self._ask_pool(parent, exclusive=True)
        made = None
        try:
            trained: Weights = ask(lease.actor.train, parent, list(conversations), train, self._config.seed)
            made = trained
        finally:
            self._end([lease], made)
        self.weights[trained.id] = trained
        return trained

    def add(self, weights: Weights) -> None:
        self.weights[weights.id] = weights

    def give_back(self) -> None:
        """Give all leases back. The next request or training takes one again."""
        with self._lock:
            leases = [held.lease for held in self._held.values()]
            self._held.clear()
        self._end(leases)

    def close(self) -> None:
        """Give all leases back, for good."""
        self._closed.set()
        self.give_back()

    def _take(self, weights_id: str) -> _Held:
        """A lease for one more request. However many threads want it, one asks the pool and the others wait for it."""
        while True:
            with self._lock:
                held = self._held.get(weights_id)
                if held is not None and time.monotonic() - held.since < RENEW_S:
                    held.in_flight += 1
                    return held
                old = self._held.pop(weights_id, None)
                asking = self._asking.get(weights_id)
                mine = asking is None
                if asking is None:
                    asking = self._asking[weights_id] = Future()
            if not mine:
                asking.result()
                continue
            try:
                self._end([old.lease] if old is not None else [])
                lease = self._ask_pool(self.weights[weights_id], lost=self._lost.pop(weights_id, None))
            except BaseException as error:
                with self._lock:
                    del self._asking[weights_id]
                asking.set_exception(error)
                raise
            with self._lock:
                del self._asking[weights_id]
                held = self._held[weights_id] = _Held(lease, in_flight=1)
            asking.set_result(None)
            return held

    def _ask_pool(self, weights: Weights, *, exclusive: bool = False, lost: tuple[int, int] | None = None) -> Lease:
        deadline, request = None, f"{self._holder}/{secrets.token_hex(4)}"
        while True:
            try:
                lease: Lease = ask(
                    self._pool.ask, self._holder, this_actor(), request, weights, exclusive, lost, self.urgency
                )
            except ActorGone as gone:
                deadline = deadline or time.monotonic() + RESTART_S
                if time.monotonic() > deadline:
                    raise ServerError(f"The pool of model servers did not come back: {gone}") from gone
                time.sleep(0.2)  # Ray is restarting the actor; it offers nothing to wait on
            else:
                return lease

    def _drop(self, endpoint: Endpoint) -> Lease | None:
        """Forget the lease on `endpoint`, unless a newer one took its place. Its requests under way may still end well."""
        with self._lock:
            held = self._held.get(endpoint.weights_id)
            if held is None or held.lease.endpoint != endpoint:
                return None
            del self._held[endpoint.weights_id]
        self._end([held.lease])
        return held.lease

    def _end(self, leases: list[Lease], made: Weights | None = None) -> None:
        if leases:
            self._pool.end.remote([lease.number for lease in leases], made)

    def _give_back_idle(self) -> None:
        while not self._closed.wait(LINGER_S / 2):
            with self._lock:
                due = time.monotonic() - LINGER_S
                idle = [w for w, held in self._held.items() if held.in_flight == 0 and held.idle_since <= due]
                leases = [self._held.pop(weights_id).lease for weights_id in idle]
            self._end(leases)
