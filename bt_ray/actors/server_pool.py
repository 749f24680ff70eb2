"""The actor that hands the sweep's model servers to trials.

A lease is a trial's right to use a server, alone, until it gives it back or dies. Leases are granted first come, first
served; a free server that last served the wanted weights is preferred. The state is small and lives here alone: when this
actor dies, so does the sweep, with its driver.
"""

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from bt_ray.actors.liveness import until_dead


@dataclass
class _Request:
    holder: str
    weights_id: str
    granted: "asyncio.Future[int]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@ray.remote(num_cpus=0)
class ServerPool:
    """Grants leases on servers, named by their index.

    Args:
        servers: The sweep's model servers.
    """

    def __init__(self, servers: "list[ActorHandle[Any]]") -> None:
        self._servers = servers
        self._last_weights: list[str | None] = [None] * len(servers)
        self._holders: list[str | None] = [None] * len(servers)
        self._waiting: deque[_Request] = deque()
        self._watched: dict[str, asyncio.Task[None]] = {}

    async def acquire(self, holder: str, holder_actor: "list[ActorHandle[Any]]", weights_id: str) -> int:
        """Lease a server to `holder`, waiting until one is free.

        Args:
            holder: The trial's name, `#`, and what tells this run of it from any other.
            holder_actor: The trial's own actor in a list (Ray would await a bare handle); the lease ends when it dies.
            weights_id: What it will ask for first.
        """
        if holder_actor and holder not in self._watched:
            self._watched[holder] = asyncio.create_task(self._end_with(holder, holder_actor[0]))
        request = _Request(holder, weights_id)
        self._waiting.append(request)
        self._grant()
        return await request.granted

    async def give_back(self, holder: str, index: int, weights_id: str | None) -> None:
        """End one lease. `weights_id` is what the server serves now."""
        if self._holders[index] == holder:
            self._holders[index] = None
            self._last_weights[index] = weights_id
            self._grant()

    async def status(self) -> list[str | None]:
        """The name of each server's holder, None where it is free."""
        return [holder and holder.partition("#")[0] for holder in self._holders]

    def _grant(self) -> None:
        while self._waiting and (free := [i for i, holder in enumerate(self._holders) if holder is None]):
            request = self._waiting.popleft()
            index = min(free, key=lambda i: (self._last_weights[i] != request.weights_id, i))
            self._holders[index] = request.holder
            request.granted.set_result(index)

    async def _end_with(self, holder: str, actor: "ActorHandle[Any]") -> None:
        """Take back all that `holder` leases once its actor is dead, ending what it left running there."""
        await until_dead(actor)
        del self._watched[holder]
        self._waiting = deque(request for request in self._waiting if request.holder != holder)
        for index, leased_by in enumerate(self._holders):
            if leased_by == holder:
                with contextlib.suppress(ray.exceptions.RayError):  # it died too: a restarted server is idle
                    await self._servers[index].stop.remote()
                self._holders[index] = None
                self._last_weights[index] = None
        self._grant()
