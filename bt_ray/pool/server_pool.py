"""The actor that owns the sweep's model servers and hands out leases on them.

`bt_ray.pool.policy` decides; this actor carries it out: it creates the servers' actors, brings them to the weights that are
wanted, and answers whoever waits. It takes back what a dead trial held. When it dies itself its servers die with it, Ray
starts it again with nothing, and the trials ask anew: that costs a start of the servers, and nothing else.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from bt_ray.errors import BtRayError, InfrastructureError, ServerError
from bt_ray.events import LeaseChanged, ServerDid
from bt_ray.models import Endpoint
from bt_ray.pool.leases import Lease, Returned, ServerView
from bt_ray.pool.liveness import until_dead
from bt_ray.pool.metrics import PoolMetrics
from bt_ray.pool.model_server import ModelServer, Served, actor_options
from bt_ray.pool.nodes import find_draining_nodes
from bt_ray.pool.policy import Placement
from bt_ray.pool.policy_types import Action, Ask, Fetch, Grant, Grow, Policy, Release, Revoke, Serve, State, Stop
from bt_ray.settings.config import ServerConfig
from bt_ray.weights import Weights

logger = logging.getLogger(__name__)
TICK_S, DRAIN_S = 1.0, 5.0
STATUS_S = 10.0
DRAINED = "its node is being drained"
DEATHS = 3
"""How often the servers may die that a lease waits for, or fail to be created, before it fails."""


@dataclass(frozen=True)
class ServerSettings:
    """What each model server's actor is created with.

    Attributes:
        config: `[server]`.
        token: What every request to a server must bear.
        across_nodes: Whether servers listen on their node's address, rather than on the loopback's.
        run_dir: The sweep's run directory.
        hub_token: The driver's token for gated models of the hub, for nodes that have none.
    """

    config: ServerConfig
    token: str
    across_nodes: bool
    run_dir: str
    hub_token: str | None = None

    def __repr__(self) -> str:
        return f"ServerSettings({self.run_dir})"


@ray.remote(num_cpus=0, max_restarts=-1)
class ServerPool:
    """Owns the model servers.

    Args:
        settings: What servers are created with.
        policies: How they are shared out, by whose slots they are in, as `bt_ray.pool.policy.Placement` has them.
        initial: How many are created at once, without anybody having asked, by the same.
        first: Base weights to load into idle servers before any trial asks, by slot group.
    """

    def __init__(
        self,
        settings: ServerSettings,
        policies: Mapping[str, Policy],
        initial: Mapping[str, int],
        first: Mapping[str, Weights] | None = None,
    ) -> None:
        self._settings = settings
        self._placement = Placement(policies, first)
        self._initial = initial
        self._actors: dict[int, ActorHandle[Any]] = {}
        self._nodes: dict[int, str] = {}
        self._endpoints: dict[int, Endpoint] = {}
        self._waiting: dict[int, asyncio.Future[Lease]] = {}
        self._by_request: dict[str, int] = {}
        self._requests: dict[int, str] = {}
        self._deaths: Counter[int] = Counter()
        self._not_created: dict[str, list[str]] = {}
        """Why servers could not be created lately, by whose slots they would be in."""
        self._watched: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(time.time_ns())  # a pool that was started again must not use a number twice
        self._session = secrets.token_hex(4)
        self._events: deque[tuple[int, LeaseChanged | ServerDid]] = deque()
        self._event_numbers = itertools.count(1)
        self._metrics = PoolMetrics(settings.run_dir)
        self._open = self._closed = False

    async def ask(
        self,
        holder: str,
        holder_actor: "list[ActorHandle[Any]]",
        request: str,
        weights: Weights,
        exclusive: bool = False,
        lost: tuple[int, int] | None = None,
        urgency: int = 0,
        returned: Returned | None = None,
    ) -> Lease:
        """A lease, as soon as there is one.

        Args:
            holder: The trial's name, `#`, and what tells this run of it from any other.
            holder_actor: The trial's own actor in a list (Ray would await a bare handle); its leases end when it dies.
            request: Names this call. Who could not hear the answer calls again by the same name: what was granted to the
                call before, or is still waited for, ends.
            weights: What requests will ask for, or what a training starts from.
            exclusive: Whether it is for a training.
            lost: The server, and its incarnation, that the holder could not reach.
            urgency: As `bt_ray.pool.policy_types.Ask` has it.
            returned: Leases that the holder gives back for it.

        Raises:
            InfrastructureError: No server could be brought to serve these weights.
        """
        self._start()
        if holder_actor and holder not in self._watched:
            self._watched.add(holder)
            self._run(self._end_with(holder, holder_actor[0]))
        if lost is not None:
            self._note_server(lost[0], "lost", reason=f"{holder.partition('#')[0]} could not reach it")
            self._placement.note_lost(*lost)
        self._forget(self._by_request.get(request))
        goes_on = self._take_back(returned or {})
        ask = Ask(next(self._numbers), holder, weights, exclusive, time.monotonic(), urgency, goes_on)
        self._by_request[request], self._requests[ask.lease] = ask.lease, request
        future = asyncio.get_running_loop().create_future()
        self._waiting[ask.lease] = future
        self._note_lease("asked", ask)
        self._placement.add_ask(ask)
        self._decide()
        return await future  # type: ignore[no-any-return]

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def end(self, returned: Returned) -> None:
        """Give leases back. Harmless for those that have ended before."""
        self._take_back(returned)
        self._decide()

    async def count_placed(self) -> tuple[int, int, list[str]]:
        """How many servers can be used, how many wait for room on the cluster, and why some could not be created."""
        self._start()
        placing = sum(server.state is State.PLACING for server in self._placement.servers.values())
        return (
            len(self._placement.servers) - placing,
            placing,
            [reason for reasons in self._not_created.values() for reason in reasons],
        )

    async def status(self) -> list[ServerView]:
        """What each server does now."""
        servers = dict(self._placement.servers)
        return list(await asyncio.gather(*(self._view(number) for number in servers)))

    async def events(self, session: str, after: int) -> "tuple[str, list[tuple[int, LeaseChanged | ServerDid]]]":
        """What happened since event `after` of the named session; a pool that was started again begins another session."""
        if session == self._session:
            while self._events and self._events[0][0] <= after:
                self._events.popleft()
        return self._session, list(self._events)

    async def close(self) -> None:
        """End all servers."""
        self._closed = True
        actors = dict(self._actors)
        self._actors.clear()
        await asyncio.gather(*(self._close(actor) for actor in actors.values()))
        for task in self._tasks:
            task.cancel()

    def _take_back(self, returned: Returned) -> bool:
        """End leases; whether one of them was on a server until now."""
        for lease in returned:
            self._note(LeaseChanged(time.time(), lease, "ended"))
        there = [self._forget(lease, made) for lease, made in returned.items()]
        return any(there)

    def _forget(self, lease: int | None, made: Weights | None = None) -> bool:
        if lease is not None:
            future = self._waiting.pop(lease, None)
            if future is not None:
                future.cancel()  # nobody listens any more, or it is done
            self._by_request.pop(self._requests.pop(lease, ""), None)
            self._deaths.pop(lease, None)
            return self._placement.end_lease(lease, time.monotonic(), made)
        return False

    def _start(self) -> None:
        """Begin. Not in the constructor, which has no event loop."""
        if not self._open:
            self._open = True
            for slots in Counter(self._initial).elements():
                self._placement.grow(time.monotonic(), slots)
            self._run(self._tick())
            self._run(self._leave_draining_nodes())
            self._decide()

    async def _tick(self) -> None:
        """Time alone may be a reason to act: a turn is over, a server was idle for long."""
        while True:
            await asyncio.sleep(TICK_S)
            self._decide()

    async def _leave_draining_nodes(self) -> None:
        """Nothing new begins on a server whose node is going away."""
        while True:
            await asyncio.sleep(DRAIN_S)
            draining: set[str] = set()
            with contextlib.suppress(Exception):  # Ray's head is out of reach for a while; the next look tells
                draining = await asyncio.to_thread(find_draining_nodes)
            for number, server in list(self._placement.servers.items()):
                node = self._nodes.get(number)
                if node in draining and not server.leaving:
                    self._note_server(number, "leaving", reason=f"{DRAINED}: {node}")
                    self._placement.note_leaving(number, time.monotonic())
            self._decide()

    def _decide(self) -> None:
        if self._closed:  # the actors that the placement speaks of are gone
            return
        for action in self._placement.decide(time.monotonic()):
            self._carry_out(action)
        self._metrics.servers(Counter(server.state.value for server in self._placement.servers.values()))
        self._metrics.set_waiting(len(self._placement.waiting))

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grow(number):
                self._note_server(number, "placing")
                self._actors[number] = self._create_server(number)
                self._run(self._place(number, self._actors[number]))
            case Serve(number, weights, beside):
                self._run(self._serve(number, self._actors[number], weights, beside))
            case Fetch(number, weights):
                self._run(self._fetch(number, self._actors[number], weights))
            case Grant(ask, number):
                self._grant(ask, number)
            case Revoke(ask, number):
                self._note_lease("revoked", ask, number)
            case Stop(number):
                self._run(self._stop(number, self._actors[number]))
            case Release(number, leaving):
                self._note_server(number, "released", reason=DRAINED if leaving else "idle")
                self._nodes.pop(number, None)
                self._endpoints.pop(number, None)
                self._run(self._close(self._actors.pop(number)))

    def _create_server(self, number: int) -> "ActorHandle[Any]":
        settings, config = self._settings, self._config(number)
        return ModelServer.options(**actor_options(config)).remote(  # type: ignore[attr-defined]
            f"server-{number}",
            config,
            settings.token,
            settings.across_nodes,
            settings.run_dir,
            hub_token=settings.hub_token,
        )

    def _config(self, number: int) -> ServerConfig:
        return self._settings.config.of(self._placement.servers[number].slots)

    async def _place(self, number: int, actor: "ActorHandle[Any]") -> None:
        slots = self._placement.servers[number].slots
        try:
            self._nodes[number] = await actor.node.remote()
        except RayError as error:
            reasons = self._not_created.setdefault(slots, [])
            reasons.append(_reason(error))
            if len(reasons) % DEATHS == 0:
                self._fail(
                    self._placement.find_waiting(slots), f"A model server's actor cannot be started: {_reason(error)}"
                )
            self._drop_dead(number, _reason(error))
            return
        self._not_created.pop(slots, None)
        self._note_server(number, "idle")
        self._placement.note_placed(number, time.monotonic(), self._nodes[number])
        self._decide()
        await until_dead(actor)
        self._drop_dead(number, "its actor died")

    def _drop_dead(self, number: int, reason: str) -> None:
        if self._actors.pop(number, None) is None:
            return  # it was released, or the pool is being closed
        self._nodes.pop(number, None)
        self._endpoints.pop(number, None)
        self._note_server(number, "dead", reason=reason)
        promised = [ask for ask in self._placement.servers[number].leases.values() if ask.lease in self._waiting]
        self._placement.note_died(number)
        self._deaths.update(ask.lease for ask in promised)
        self._fail(
            [ask for ask in promised if self._deaths[ask.lease] >= DEATHS], f"Its server died {DEATHS} times: {reason}"
        )
        self._decide()

    async def _serve(self, number: int, actor: "ActorHandle[Any]", weights: Weights, beside: tuple[Weights, ...]) -> None:
        began = time.monotonic()
        try:
            served: Served = await _call_until_ended(actor.serve, weights, beside)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BtRayError) else InfrastructureError(_reason(error))
            self._note_server(number, "failed", weights.id, time.monotonic() - began, str(cause))
            failed = self._placement.note_failed(number, time.monotonic())
            self._answer(failed, cause)
        except RayError:
            return  # `_place` is told when the actor is dead
        else:
            change = served.change
            if change.how in ("start", "swap"):
                self._metrics.observe_serve(change.how, change.seconds)
            self._note_server(number, f"serving, {change.how}", weights.id, change.seconds, change.reason)
            self._endpoints[number] = served.endpoint
            self._placement.note_served(number, time.monotonic())
        self._decide()

    async def _fetch(self, number: int, actor: "ActorHandle[Any]", weights: Weights) -> None:
        whole = False
        try:
            await actor.fetch.remote(weights)
            whole = True
        except RayError as error:  # whoever uses them there fetches them, and fails if that fails again
            logger.warning("Server %s: %s could not be fetched ahead: %s", number, weights.id, _reason(error))
        self._placement.note_fetched(number, weights, whole=whole)
        self._decide()

    def _grant(self, ask: Ask, number: int) -> None:
        server = self._placement.servers[number]
        self._note_lease("granted", ask, number)
        if ask.exclusive:
            self._note_server(number, "training", ask.weights.id)
        endpoint = None if ask.exclusive else replace(self._endpoints[number], weights_id=ask.weights.id)
        future = self._waiting.pop(ask.lease, None)
        if future is not None and not future.done():
            future.set_result(Lease(ask.lease, number, server.incarnation, endpoint, self._actors[number]))

    def _fail(self, asks: list[Ask], why: str) -> None:
        self._answer(asks, ServerError(why))

    def _answer(self, asks: list[Ask], error: Exception) -> None:
        for ask in asks:
            self._note_lease("failed", ask)
            future = self._waiting.get(ask.lease)
            if future is not None and not future.done():
                future.set_exception(error)
            self._forget(ask.lease)

    async def _end_with(self, holder: str, actor: "ActorHandle[Any]") -> None:
        """Take back all that `holder` has once its actor is dead, ending what it left running."""
        await until_dead(actor)
        self._watched.discard(holder)
        self._note(LeaseChanged(time.time(), None, "holder died", holder.partition("#")[0]))
        self._placement.note_holder_died(holder, time.monotonic())
        for request in [request for request in self._by_request if request.startswith(f"{holder}/")]:
            self._forget(self._by_request[request])
        self._decide()

    async def _stop(self, number: int, actor: "ActorHandle[Any]") -> None:
        try:
            await _call_until_ended(actor.stop)
        except RayTaskError as error:
            logger.warning("Server %s does not stop, and is replaced: %s", number, _reason(error))
            ray.kill(actor)
        except RayError:
            return  # `_place` is told when it is dead
        else:
            self._note_server(number, "idle", reason="its holder died")
            self._placement.note_stopped(number, time.monotonic())
            self._decide()

    async def _close(self, actor: "ActorHandle[Any]") -> None:
        """End a server's processes and its actor. The processes would end with the actor anyway."""
        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(actor.close.remote().future()), STATUS_S + 5)
        ray.kill(actor)

    async def _view(self, number: int) -> ServerView:
        server, actor = self._placement.servers[number], self._actors.get(number)
        asks = [*server.leases.values(), *([server.training] if server.training else [])]
        holders = tuple(dict.fromkeys(ask.holder.partition("#")[0] for ask in asks))
        state, weights_id, detail = server.state.value, next(iter(server.serving), None), ""
        if server.state is State.PLACING:
            detail = f"needs {self._config(number).needs} on one node"
        elif actor is not None:
            with contextlib.suppress(RayError, TimeoutError):
                status = await asyncio.wait_for(asyncio.wrap_future(actor.status.remote().future()), STATUS_S)
                state, weights_id, detail = status.state, status.weights_id, status.detail
        return ServerView(number, state, weights_id, holders, detail)

    def _note_lease(self, state: str, ask: Ask, server: int | None = None) -> None:
        holder = ask.holder.partition("#")[0]
        self._note(LeaseChanged(time.time(), ask.lease, state, holder, ask.weights.id, ask.exclusive, server))

    def _note_server(
        self, server: int, state: str, weights_id: str | None = None, seconds: float | None = None, reason: str = ""
    ) -> None:
        self._note(ServerDid(time.time(), server, state, weights_id, seconds, reason))

    def _note(self, event: LeaseChanged | ServerDid) -> None:
        self._events.append((next(self._event_numbers), event))

    def _run(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _call_until_ended(method: Any, *arguments: Any) -> Any:
    """Call an actor's method, which may be called twice, until it is known to have ended, or the actor to be dead."""
    while True:
        try:
            return await method.remote(*arguments)
        except ActorUnavailableError:
            await asyncio.sleep(TICK_S)  # out of reach for a while; Ray offers nothing to wait on


def _reason(error: BaseException) -> str:
    """What the innermost error says, in a line."""
    while isinstance(inner := getattr(error, "cause", None), BaseException):
        error = inner
    return str(error).strip().partition("\n")[0] or repr(error)
