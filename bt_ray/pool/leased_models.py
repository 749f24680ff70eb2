"""A trial's side of the pool: `Models` on leased servers.

A shared lease is taken by the first request for weights, and given back when no request was under way for a moment, before
the trial waits for anything else, and by its death. The pool may end it earlier: the guard of the server then refuses the
next request, and the trial asks the pool again. A training's lease is kept for that moment too, and goes over to what the
trial asks for next in one call to the pool, so that nobody comes between; so do shared leases to a training.
"""

import math
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.actor import ActorHandle

from bt_ray.errors import ServerError
from bt_ray.models import Conversation, Endpoint
from bt_ray.pool.calls import ActorGone, ask
from bt_ray.pool.leases import Lease, Returned
from bt_ray.pool.liveness import this_actor
from bt_ray.settings.config import SweepConfig, override_train
from bt_ray.slot.training.job import check_trainable
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


@dataclass(frozen=True)
class _Trained:
    """The lease of a training that has ended, what it made, and when."""

    lease: Lease
    made: Weights
    at: float


class LeasedModels:
    """`bt_ray.models.TrialModels` on leases of the pool.

    Args:
        holder: The trial's name.
        pool: The sweep's pool.
        config: The sweep's settings.

    Attributes:
        weights: All weights that are known, by id.
        urgency: Of what leases are asked for, as `bt_ray.pool.policy_types.Ask` has it.
    """

    def __init__(self, holder: str, pool: "ActorHandle[Any]", config: SweepConfig) -> None:
        self._holder = f"{holder}#{secrets.token_hex(4)}"  # a trial that is run again is another holder
        self._pool = pool
        self._config = config
        self.weights: dict[str, Weights] = {}
        self.urgency = 0
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._trained: list[_Trained] = []
        self._asks = 0
        """Calls of the pool that are under way."""
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

    def report_loss(self, endpoint: Endpoint) -> None:
        lease = self._drop(endpoint)
        if lease is not None:
            self._lost[endpoint.weights_id] = (lease.server, lease.incarnation)

    def report_refusal(self, endpoint: Endpoint) -> None:
        self._drop(endpoint)

    def kill(self, weights_id: str) -> None:
        """Nothing: the lease is given back in a moment, or goes over to the training for which the LM is killed."""

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        parent = self.weights[weights_id]
        train = override_train(self._config.train, train_kwargs)
        check_trainable(self._config.server.of(parent.model), train)
        lease = self._ask_pool(parent, exclusive=True, returned=self._take_leases())
        try:
            trained: Weights = ask(lease.actor.train, parent, list(conversations), train, self._config.seed)
        except BaseException:
            self._end({lease.number: None})
            raise
        self.weights[trained.id] = trained
        with self._lock:
            # Another training of this trial may wait for the server, or nobody be there any more to give it back.
            kept = not self._asks and not self._closed.is_set()
            if kept:
                self._trained.append(_Trained(lease, trained, time.monotonic()))
        if not kept:
            self._end({lease.number: trained})
        return trained

    def add(self, weights: Weights) -> None:
        self.weights[weights.id] = weights

    def give_back(self) -> None:
        """Give all leases back. The next request or training takes one again."""
        self._end(self._take_leases())

    def close(self) -> None:
        """Give all leases back, for good."""
        self._closed.set()
        self.give_back()

    def _take_leases(self) -> Returned:
        """All leases, which are this trial's no more."""
        with self._lock:
            returned: Returned = {held.lease.number: None for held in self._held.values()}
            self._held.clear()
            return returned | self._take_ended_trainings()

    def _take_ended_trainings(self, *, base: str | None = None, until: float = math.inf) -> Returned:
        """The leases of trainings of a base that ended until then, which are this trial's no more. For who has the lock."""
        returned = [trained for trained in self._trained if base in (None, trained.made.base) and trained.at <= until]
        self._trained = [trained for trained in self._trained if trained not in returned]
        return {trained.lease.number: trained.made for trained in returned}

    def _take(self, weights_id: str) -> _Held:
        """A lease for one more request. However many threads want it, one asks the pool and the others wait for it."""
        weights = self.weights[weights_id]
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
                    returned = self._take_ended_trainings(base=weights.base)
            if not mine:
                asking.result()
                continue
            try:
                self._end({old.lease.number: None} if old is not None else {})
                lost = self._lost.pop(weights_id, None)
                lease = self._ask_pool(weights, lost=lost, returned=returned)
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

    def _ask_pool(
        self,
        weights: Weights,
        *,
        exclusive: bool = False,
        lost: tuple[int, int] | None = None,
        returned: Returned | None = None,
    ) -> Lease:
        with self._lock:
            self._asks += 1
        try:
            return self._ask_for_lease(weights, exclusive, lost, returned or {})
        finally:
            with self._lock:
                self._asks -= 1

    def _ask_for_lease(self, weights: Weights, exclusive: bool, lost: tuple[int, int] | None, returned: Returned) -> Lease:
        deadline, request = None, f"{self._holder}/{secrets.token_hex(4)}"
        while True:
            try:
                lease: Lease = ask(
                    self._pool.ask,
                    self._holder,
                    this_actor(),
                    request,
                    weights,
                    exclusive=exclusive,
                    lost=lost,
                    urgency=self.urgency,
                    returned=returned,
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
        self._end({held.lease.number: None})
        return held.lease

    def _end(self, returned: Returned) -> None:
        if returned:
            self._pool.end.remote(returned)

    def _give_back_idle(self) -> None:
        while not self._closed.wait(LINGER_S / 2):
            with self._lock:
                due = time.monotonic() - LINGER_S
                idle = [w for w, held in self._held.items() if held.in_flight == 0 and held.idle_since <= due]
                returned: Returned = {self._held.pop(weights_id).lease.number: None for weights_id in idle}
                returned |= self._take_ended_trainings(until=due)
            self._end(returned)
