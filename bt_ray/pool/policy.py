"""Which server serves which lease, when to swap, grow, take back or release one: a pure state machine.

Whoever owns the servers tells it what happened (`add_ask`, `end_lease`, `note_placed`, ...) and asks `decide` what to do
next. It knows no Ray, no clock and no process; `bt_ray.pool.server_pool` carries its actions out.

A lease is shared, for requests to given weights, or exclusive, for a training. First come leases for the steps with the
most steps after them; among equals those whose holder gives another back for them, then trainings, then those that were
asked for first; but one which is no burden to those before it need not wait for them. The preference is: a free server
that serves the weights already; a free one with the same base (a swap); one that is being started with them, for nobody
yet; one with no model in it (a start); growth up to the limit; a free one with another base (a relaunch); sharing; else a
server whose turn is over is taken back from its shared leases, between two requests, so that nobody waits for ever.
Where fine-tunes are adapters a server serves their base and several of them, so leases for different weights share it too.
Among servers that are alike, one goes first whose node has a copy of the weights; while a lease waits, they are copied to
the node of the server that should be free for it first.
A model may have slots of its own; then all of this holds among its servers, and among those of all other models.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from bt_ray.pool.policy_types import (
    Action,
    Ask,
    Copies,
    Fetch,
    Grant,
    Grow,
    Policy,
    Release,
    Revoke,
    Serve,
    Server,
    State,
    Stop,
)
from bt_ray.weights import Weights


class Placement:
    """The servers, the leases on them, and those that wait.

    Args:
        policies: How servers are shared out: under `""`, and among the slots of a model's own under its `Weights.model`.
        first: What a server is started with before anybody asks, as everybody will ask for it: by whose slots it is in.
    """

    def __init__(self, policies: Mapping[str, Policy], first: Mapping[str, Weights] | None = None) -> None:
        self.policies = policies
        self.first = first or {}
        self.servers: dict[int, Server] = {}
        self.waiting: list[Ask] = []
        self._copies = Copies()
        self._numbers = 0
        self._actions: list[Action] = []

    def grow(self, now: float, slots: str = "") -> Server:
        """Add a server, which `decide` has created."""
        server = Server(self._numbers, slots, since=now)
        self._numbers += 1
        self.servers[server.number] = server
        self._actions.append(Grow(server.number))
        return server

    def add_ask(self, ask: Ask) -> None:
        """A lease is wanted."""
        self.waiting.append(ask)
        self.waiting.sort(key=lambda ask: ask.turn)

    def end_lease(self, lease: int, now: float, made: Weights | None = None) -> bool:
        """A lease was given back, or is not wanted any more. Harmless when it has ended before.

        Returns:
            Whether it was on a server until now.

        Args:
            lease: Its number.
            now: The time, in seconds.
            made: What the training that it was for left on its node.
        """
        self.waiting = [ask for ask in self.waiting if ask.lease != lease]
        was_there = False
        for server in self.servers.values():
            if server.leases.pop(lease, None) is not None:
                server.granted.discard(lease)
                server.idle_since, was_there = now, True
            if server.training is not None and server.training.lease == lease:
                if made is not None:
                    self._copies.add(server.node, server.training.weights, made)
                else:
                    self._copies.drop(server.node, server.training.weights)
                server.training = None
                server.idle_since, was_there = now, True
        return was_there

    def note_holder_died(self, holder: str, now: float) -> None:
        """All that a holder has, and waits for, has ended; its training is to be stopped."""
        training = [s for s in self.servers.values() if s.training is not None and s.training.holder == holder]
        asks = [*self.waiting, *(ask for server in self.servers.values() for ask in server.leases.values())]
        for lease in [ask.lease for ask in asks if ask.holder == holder]:
            self.end_lease(lease, now)
        for server in training:
            server.training = None
            server.state = State.STOPPING
            self._actions.append(Stop(server.number))

    def note_placed(self, number: int, now: float, node: str | None = None) -> None:
        """A server that was asked for can be used; no model is in it.

        Args:
            number: The server's.
            now: The time, in seconds.
            node: Where it is; default: on a node of its own.
        """
        if (server := self.servers.get(number)) is not None:
            server.state, server.idle_since = State.READY, now
            server.node = node if node is not None else f"server {number}"

    def note_served(self, number: int, now: float) -> None:
        """A server serves what it was to serve."""
        if (server := self.servers.get(number)) is not None and server.state is State.CHANGING:
            server.state, server.idle_since = State.READY, now
            server.incarnation += 1
            self._copies.add(server.node, *server.serving.values())
            if not server.granted:  # else a turn goes on
                server.since = now

    def note_failed(self, number: int, now: float) -> list[Ask]:
        """A server could not be brought to serve what it was to serve. Returns the leases that fail with it."""
        if (server := self.servers.get(number)) is None:
            return []
        self._copies.drop(server.node, *server.serving.values())
        server.state, server.idle_since = State.READY, now
        server.serving, server.base = {}, None
        server.incarnation += 1
        return server.drop_leases()

    def note_fetched(self, number: int, weights: Weights, *, whole: bool) -> None:
        """Weights that were to be copied to a server's node are there, or could not be had."""
        if (server := self.servers.get(number)) is not None:
            server.fetching, server.fetches = None, whole
            if whole:
                self._copies.add(server.node, weights)

    def note_lost(self, number: int, incarnation: int) -> None:
        """A holder could not reach a server, as it was at that time. It is looked at, and brought back."""
        server = self.servers.get(number)
        if server is None or server.incarnation != incarnation or server.state is not State.READY or not server.serving:
            return
        if server.training is None and not server.leaving:
            self._serve(server, *server.serving.values())

    def note_stopped(self, number: int, now: float) -> None:
        """What ran on a server has ended, its model too."""
        if (server := self.servers.get(number)) is not None:
            server.state, server.idle_since = State.READY, now
            server.serving, server.base = {}, None

    def note_leaving(self, number: int, now: float) -> None:
        """A server's node is going away. What began there goes on; another server is created for what comes next."""
        server = self.servers.get(number)
        if server is None or server.leaving or server.state is State.PLACING:
            return
        server.leaving = True
        if (server.leases or server.training is not None) and self._may_grow(server.slots):
            self.grow(now, server.slots)
        self._take_back_promised(server)

    def note_died(self, number: int) -> list[Ask]:
        """A server is gone. Returns the leases that were on it; those that were not granted yet wait again."""
        server = self.servers.pop(number, None)
        if server is None:
            return []
        self._take_back_promised(server)
        return [*server.leases.values(), *([server.training] if server.training is not None else [])]

    def decide(self, now: float) -> list[Action]:
        """What to do now, in order."""
        wanted: Counter[str] = Counter()
        missed = Counter(ask.weights.id for ask in self.waiting if not ask.exclusive)
        candidates: dict[str, _Candidates] = {}
        for ask in list(self.waiting):
            slots = self._slots(ask.weights)
            if slots not in candidates:
                candidates[slots] = self._candidates(slots, now)
            server = self._server_for(ask, candidates[slots], missed, now)
            if server is not None:
                self.waiting.remove(ask)
                missed[ask.weights.id] -= not ask.exclusive
                wanted[slots] += bool(server.leases)
                self._give(server, ask)
                del candidates[slots]
        for server in self.servers.values():
            if server.state is State.READY and len(server.granted) < len(server.leases):
                for lease in sorted(server.leases.keys() - server.granted):
                    server.granted.add(lease)
                    self._actions.append(Grant(server.leases[lease], server.number))
        wanted.update(self._slots(ask.weights) for ask in self.waiting)
        wanted.subtract(server.slots for server in self.servers.values() if server.state is State.PLACING)
        for slots in wanted.elements():
            if self._may_grow(slots):
                self.grow(now, slots)
        self._start_ahead()
        self._fetch_ahead()
        self._release_leaving()
        self._release_idle(now)
        actions, self._actions = self._actions, []
        return actions

    def find_waiting(self, slots: str) -> list[Ask]:
        """The asks that only a server in these slots can serve."""
        return [ask for ask in self.waiting if self._slots(ask.weights) == slots]

    def _slots(self, weights: Weights) -> str:
        return weights.model if weights.model in self.policies else ""

    def _candidates(self, slots: str, now: float) -> "_Candidates":
        policy, servers = self.policies[slots], [server for server in self.servers.values() if server.slots == slots]
        found = _Candidates(
            free=[server for server in servers if server.free],
            may_grow=self._may_grow(slots) or any(server.state is State.PLACING for server in servers),
        )
        for server in servers:
            if server.training is not None or server.leaving or server.state not in (State.READY, State.CHANGING):
                continue
            for weights_id in server.serving:
                found.serving.setdefault(weights_id, []).append(server)
            if server.state is State.READY and server.leases:
                if policy.adapters and server.base is not None:
                    found.by_base.setdefault(server.base, []).append(server)
                if now - server.since >= policy.turn_s:
                    found.turn_over.append(server)
        return found

    def _server_for(self, ask: Ask, among: "_Candidates", missed: Mapping[str, int], now: float) -> Server | None:
        def worth(server: Server) -> tuple[int, bool, bool, float]:
            """Sorts first the server that others miss the least."""
            missed_there = sum(missed.get(weights_id, 0) for weights_id in server.serving)
            ends = server.base is not None and not self.policies[server.slots].stays_up
            return (missed_there, not self._at_hand(server, ask.weights), ends, server.idle_since)

        impatient = not among.may_grow or now - ask.since >= self.policies[self._slots(ask.weights)].patience_s
        turn_over = among.turn_over if impatient else []
        if ask.exclusive:
            return _first(among.free, worth) or _first_to_take_back(turn_over, ask)
        base = ask.weights.base
        return (
            _first([server for server in among.free if server.serves(ask.weights)], worth)
            or _first([server for server in among.free if server.base == base], worth)
            or _first(self._find_started_ahead(ask, among), worth)
            or _first([server for server in among.free if server.base is None], worth)
            or (_first([s for s in among.free if s.base not in (None, base)], worth) if impatient else None)
            or _first(self._shareable(ask, among), lambda server: (len(server.leases), server.number))
            or _first_to_take_back(turn_over, ask)
        )

    def _find_started_ahead(self, ask: Ask, among: "_Candidates") -> list[Server]:
        """Servers that are being brought to the weights already, for nobody."""
        serving = among.serving.get(ask.weights.id, [])
        return [server for server in serving if server.state is State.CHANGING and not server.leases]

    def _shareable(self, ask: Ask, among: "_Candidates") -> list[Server]:
        roomy = [server for server in among.by_base.get(ask.weights.base, []) if self._has_room(server, ask.weights)]
        return [*among.serving.get(ask.weights.id, []), *roomy]

    def _has_room(self, server: Server, weights: Weights) -> bool:
        """Whether a server can take an adapter beside all that its leases are for."""
        if weights.on is None or server.state is not State.READY or server.base != weights.base or not server.leases:
            return False
        return sum(other.on is not None for other in _lease_weights(server).values()) < self.policies[server.slots].adapters

    def _give(self, server: Server, ask: Ask) -> None:
        stay = server.serves(ask.weights) or self._has_room(server, ask.weights)
        if ask.exclusive or not stay:
            self._take_back_promised(server)
            self._actions += [Revoke(dropped, server.number) for dropped in server.drop_leases()]
        if ask.exclusive:
            server.training, server.serving = ask, {}
            if not self.policies[server.slots].stays_up:
                server.base = None
            self._actions.append(Grant(ask, server.number))
            return
        if not server.serves(ask.weights):
            self._serve(server, ask.weights, *_lease_weights(server).values())
        server.leases[ask.lease] = ask

    def _serve(self, server: Server, weights: Weights, *beside: Weights) -> None:
        if weights.on is not None and weights.on not in beside:
            beside = (*beside, weights.on)
        server.state, server.base = State.CHANGING, weights.base
        server.serving = {served.id: served for served in (weights, *beside)}
        self._actions.append(Serve(server.number, weights, beside))

    def _may_grow(self, slots: str) -> bool:
        there = sum(server.slots == slots and not server.leaving for server in self.servers.values())
        return there < self.policies[slots].limit

    def _take_back_promised(self, server: Server) -> None:
        """Leases on a server that were not granted yet wait again."""
        for lease in server.leases.keys() - server.granted:
            self.waiting.append(server.leases.pop(lease))
        self.waiting.sort(key=lambda ask: ask.turn)

    def _start_ahead(self) -> None:
        """Start what is wanted at first in servers that nobody has used yet: in one, and when that is up, in the others.

        The later ones start while the first answers, and find what it has downloaded and compiled. One that would end with
        the first training in its slot is not worth its start.
        """
        for slots, weights in self.first.items():
            there = [server for server in self.servers.values() if server.slots == slots]
            unused = [server for server in there if server.free and server.base is None and not server.incarnation]
            if all(server.base is None and not server.incarnation for server in there):
                unused = unused[:1]
            elif not self.policies[slots].stays_up or not any(server.is_up for server in there):
                unused = []
            for server in unused:
                self._serve(server, weights)

    def _fetch_ahead(self) -> None:
        """Have weights that are waited for copied to the nodes of the servers that are next in line for them.

        First in line are new servers, which need nothing ahead; then those that have their work longest, trainings last.
        """
        for slots in {self._slots(ask.weights) for ask in self.waiting}:
            there = [server for server in self.servers.values() if server.slots == slots and not server.leaving]
            placing = sum(server.state is State.PLACING for server in there)
            busy = [server for server in there if server.work]
            busy.sort(key=lambda server: (server.training is not None, min(server.work)))
            waited_for = list({ask.weights.id: ask.weights for ask in self.find_waiting(slots)}.values())
            for weights, server in zip(waited_for[placing:], busy, strict=False):
                if server.fetches and server.fetching is None and not self._at_hand(server, weights):
                    server.fetching = weights
                    self._actions.append(Fetch(server.number, weights))

    def _at_hand(self, server: Server, weights: Weights) -> bool:
        """Whether a server's node has a copy of the weights, or is getting one."""
        return server.fetching == weights or self._copies.has(server.node, weights)

    def _release_leaving(self) -> None:
        """A server whose node is going away is of no use any more when nothing is on it."""
        for server in list(self.servers.values()):
            if server.leaving and server.empty:
                self._release(server)

    def _release_idle(self, now: float) -> None:
        idle = [s for s in self.servers.values() if now - s.idle_since >= self.policies[s.slots].idle_timeout_s and s.free]
        if not idle:
            return
        wanted = {self._slots(ask.weights) for ask in self.waiting}
        there = Counter(server.slots for server in self.servers.values())
        for server in sorted(idle, key=lambda server: server.idle_since):
            if server.slots not in wanted and there[server.slots] > self.policies[server.slots].minimum:
                there[server.slots] -= 1
                self._release(server)

    def _release(self, server: Server) -> None:
        del self.servers[server.number]
        self._actions.append(Release(server.number, server.leaving))


@dataclass(frozen=True)
class _Candidates:
    """The servers of some slots, as a lease that waits may get them: looked at once for all who wait.

    Attributes:
        free: Those with nothing on them.
        may_grow: Whether there may be, or is about to be, another.
        serving: Those that are not training, by the id of what they serve.
        by_base: Those with leases, where adapters are served, by their base.
        turn_over: Those with leases whose turn is over.
    """

    free: list[Server]
    may_grow: bool
    serving: dict[str, list[Server]] = field(default_factory=dict)
    by_base: dict[str, list[Server]] = field(default_factory=dict)
    turn_over: list[Server] = field(default_factory=list)


def _first_to_take_back(turn_over: Iterable[Server], ask: Ask) -> Server | None:
    """The server that is to be taken back from its shared leases for `ask`."""
    return _first(turn_over, lambda server: (server.base != ask.weights.base, len(server.leases), server.since))


def _lease_weights(server: Server) -> dict[str, Weights]:
    """What a server's leases are for, by id."""
    return {ask.weights.id: ask.weights for ask in server.leases.values()}


def _first(servers: Iterable[Server], key: Callable[[Server], tuple[float | bool, ...]]) -> Server | None:
    return min(servers, key=key, default=None)
