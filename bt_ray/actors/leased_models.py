"""A trial's side of the pool: `Models` on leased servers.

A trial leases a server on its first request and keeps up to `quota` of them. Requests for weights that none of them
serves wait until one has no request under way, and that one is relaunched on those weights.
"""

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from bt_ray.actors.calls import ActorGone, ask
from bt_ray.actors.liveness import this_actor
from bt_ray.config import SweepConfig, override_train
from bt_ray.errors import ServerError
from bt_ray.hosting import Conversation
from bt_ray.serving.server import Endpoint
from bt_ray.training.job import check_trainable
from bt_ray.weights import Weights

RESTART_S = 60.0
"""Seconds that an actor may take to come back after its process died."""


@dataclass
class _Lease:
    index: int
    endpoint: Endpoint | None = None
    in_flight: int = 0
    training: bool = False
    used: float = 0.0


class LeasedModels:
    """`bt_ray.hosting.Models` for one trial.

    Args:
        holder: The trial's name.
        pool: The sweep's pool.
        servers: The sweep's model servers.
        base: The student's base weights.
        config: The sweep's settings.
    """

    def __init__(
        self,
        holder: str,
        pool: "ActorHandle[Any]",
        servers: "Sequence[ActorHandle[Any]]",
        *,
        base: Weights,
        config: SweepConfig,
    ) -> None:
        self._holder = f"{holder}#{secrets.token_hex(4)}"  # a trial that is run again is another holder
        self._pool = pool
        self._servers = servers
        self._config = config
        self._quota = config.servers_per_trial
        self.weights = {base.id: base}
        self._leases: list[_Lease] = []
        self._door = threading.Lock()
        """Held while a request is given its server, so that whoever waits for other weights is not overtaken."""
        self._changed = threading.Condition()

    @contextmanager
    def request(self, weights_id: str) -> Iterator[Endpoint]:
        with self._door:
            lease = self._lease_for(weights_id)
            if lease.endpoint is None:
                self._serve(lease, weights_id)
            endpoint = lease.endpoint
            assert endpoint is not None
            with self._changed:
                lease.in_flight += 1
                lease.used = time.monotonic()
        try:
            yield endpoint
        finally:
            with self._changed:
                lease.in_flight -= 1
                self._changed.notify_all()

    def lost(self, endpoint: Endpoint) -> None:
        with self._changed:
            for lease in self._leases:
                if lease.endpoint == endpoint:
                    lease.endpoint = None

    def kill(self, weights_id: str) -> None:
        """Nothing: the trial keeps its lease, and the next request or training replaces the server."""

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        parent = self.weights[weights_id]
        train = override_train(self._config.train, train_kwargs)
        check_trainable(self._config.server, train)
        with self._door:
            lease = self._lease_for(weights_id)
            with self._changed:
                self._changed.wait_for(lambda: lease.in_flight == 0)
                lease.training, lease.endpoint = True, None
        try:
            arguments = (parent, list(conversations), train, self._config.seed)
            trained: Weights = ask(self._servers[lease.index].train, *arguments)
        finally:
            with self._changed:
                lease.training = False
                self._changed.notify_all()
        self.weights[trained.id] = trained
        return trained

    def add(self, weights: Weights) -> None:
        self.weights[weights.id] = weights

    def give_back(self) -> None:
        """Give all leases back. The next request or training takes one again."""
        with self._door:
            leases, self._leases = self._leases, []
        for lease in leases:
            served = lease.endpoint.weights_id if lease.endpoint else None
            ask(self._pool.give_back, self._holder, lease.index, served)

    def _lease_for(self, weights_id: str) -> _Lease:
        """A lease that serves these weights, or that nothing uses; called with the door held."""
        with self._changed:
            while True:
                serving = [lease for lease in self._leases if lease.endpoint and lease.endpoint.weights_id == weights_id]
                if serving:
                    return serving[0]
                if len(self._leases) < self._quota:
                    break
                unused = [lease for lease in self._leases if lease.in_flight == 0 and not lease.training]
                if unused:
                    lease = min(unused, key=lambda lease: lease.used)
                    lease.endpoint = None
                    return lease
                self._changed.wait()
        lease = _Lease(ask(self._pool.acquire, self._holder, this_actor(), weights_id))
        with self._changed:
            self._leases.append(lease)
        return lease

    def _serve(self, lease: _Lease, weights_id: str) -> None:
        server, weights = self._servers[lease.index], self.weights[weights_id]
        deadline = None
        while True:
            try:
                endpoint: Endpoint = ask(server.serve, weights, timeout_s=self._config.server.start_timeout_s + RESTART_S)
            except ActorGone as gone:
                deadline = deadline or time.monotonic() + RESTART_S
                if time.monotonic() > deadline:
                    raise ServerError(f"Model server {lease.index} did not come back: {gone}") from gone
                time.sleep(0.2)  # Ray is restarting the actor; it offers nothing to wait on
            else:
                with self._changed:
                    lease.endpoint = endpoint
                return
