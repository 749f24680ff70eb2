"""The pool's decisions: examples of each preference, laws under random events, and a simulation of thousands of leases."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bt_ray.placement import Action, Ask, Grant, Grow, Placement, Policy, Release, Revoke, Serve, Server, State, Stop
from bt_ray.weights import Weights

A, A1, A2 = Weights("a", "a"), Weights("a-ft-1", "1", "a"), Weights("a-ft-2", "2", "a")
B = Weights("b", "b")
ALL_WEIGHTS = (A, A1, A2, B)


class Pool:
    """A placement, and a clock, with servers that do at once what they are told."""

    def __init__(self, **policy: float) -> None:
        self.placement = Placement(Policy(**{"limit": 1, "turn_s": 60, "patience_s": 30, **policy}))  # type: ignore[arg-type]
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.done: list[Action] = []

    def ask(self, weights: Weights, holder: str = "trial", *, exclusive: bool = False) -> int:
        lease = next(self.numbers)
        self.placement.asked(Ask(lease, holder, weights, exclusive, self.now))
        self.settle()
        return lease

    def end(self, lease: int) -> None:
        self.placement.ended(lease, self.now)
        self.settle()

    def settle(self, seconds: float = 0) -> None:
        self.now += seconds
        while actions := self.placement.decide(self.now):
            self.done += actions
            for action in actions:
                match action:
                    case Grow(number):
                        self.placement.placed(number, self.now)
                    case Serve(number):
                        self.placement.served(number, self.now)
                    case Stop(number):
                        self.placement.stopped(number, self.now)

    def server_of(self, lease: int) -> int | None:
        """Where a lease was granted."""
        return next((a.server for a in reversed(self.done) if isinstance(a, Grant) and a.lease.lease == lease), None)

    def served(self) -> list[tuple[int, str]]:
        return [(action.server, action.weights.id) for action in self.done if isinstance(action, Serve)]


def test_a_free_server_that_serves_the_weights_is_preferred() -> None:
    pool = Pool(limit=2)
    leases = [pool.ask(A1), pool.ask(A2)]
    for lease in leases:
        pool.end(lease)
    assert pool.server_of(pool.ask(A2)) == 1
    assert pool.server_of(pool.ask(A1)) == 0
    assert pool.served() == [(0, "a-ft-1"), (1, "a-ft-2")], "nothing had to change"


def test_a_swap_is_preferred_to_a_start() -> None:
    pool = Pool(limit=1)
    pool.end(pool.ask(A))
    pool.placement.policy = Policy(limit=2)
    pool.placement.grow(pool.now)
    pool.settle()
    assert pool.server_of(pool.ask(A1)) == 0


def test_growth_is_preferred_to_a_relaunch_until_patience_is_over() -> None:
    pool = Pool(limit=2)
    pool.end(pool.ask(A))
    assert pool.server_of(pool.ask(B)) == 1, "it grew"
    full = Pool(limit=1)
    full.end(full.ask(A))
    assert full.server_of(full.ask(B)) == 0, "it could not grow"

    slow = Placement(Policy(limit=2, patience_s=30))
    server = slow.grow(0)
    slow.placed(server.number, 0)
    slow.asked(Ask(1, "x", A, False, 0))
    assert slow.decide(0)[1:] == [Serve(0, A)]
    slow.served(0, 1)
    slow.ended(1, 2)
    slow.asked(Ask(2, "x", B, False, 2))
    assert slow.decide(2) == [Grow(1)], "which never comes"
    assert slow.decide(31) == []
    assert slow.decide(32) == [Serve(0, B)]


def test_servers_are_shared_when_none_is_free() -> None:
    pool = Pool(limit=2)
    for _ in range(2):
        pool.placement.grow(pool.now)
    pool.settle()
    assert [pool.server_of(pool.ask(A, f"trial {i}")) for i in range(4)] == [0, 1, 0, 1]


def test_a_server_is_shared_at_once_while_the_pool_grows() -> None:
    pool = Pool(limit=2)
    assert [pool.server_of(pool.ask(A, f"trial {i}")) for i in range(3)] == [0, 0, 1]


def test_a_lease_on_a_server_that_is_still_changing_begins_when_it_serves() -> None:
    placement = Placement(Policy(limit=1))
    placement.asked(Ask(1, "x", A, False, 0))
    assert placement.decide(0) == [Grow(0)]
    placement.placed(0, 1)
    assert placement.decide(1) == [Serve(0, A)]
    placement.asked(Ask(2, "y", A, False, 2))
    assert placement.decide(2) == []
    placement.served(0, 3)
    assert [action.lease.lease for action in placement.decide(3) if isinstance(action, Grant)] == [1, 2]


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_server_whose_turn_is_over_is_taken_back_for_who_waits(exclusive: bool) -> None:
    pool = Pool(limit=1, turn_s=60)
    first = pool.ask(A)
    second = pool.ask(A1, exclusive=exclusive)
    pool.settle(59)
    assert pool.server_of(second) is None
    pool.settle(1)
    assert pool.server_of(second) == 0
    assert [action.lease.lease for action in pool.done if isinstance(action, Revoke)] == [first]


def test_who_keeps_sharing_a_server_starves_nobody() -> None:
    pool = Pool(limit=1, turn_s=60)
    pool.ask(A)
    waits = pool.ask(A1)
    for _ in range(30):
        pool.ask(A)
        pool.settle(2)
    assert pool.server_of(waits) == 0


def test_nobody_shares_with_a_training_or_ends_it() -> None:
    pool = Pool(limit=1)
    training = pool.ask(A, exclusive=True)
    assert pool.server_of(training) == 0
    others = [pool.ask(A), pool.ask(A1, exclusive=True)]
    pool.settle(1000)
    assert [pool.server_of(lease) for lease in others] == [None, None]
    pool.end(training)
    assert pool.server_of(others[0]) == 0


def test_a_dead_holders_training_is_stopped_before_anybody_else_gets_the_server() -> None:
    pool = Pool(limit=1)
    pool.ask(A, "dead", exclusive=True)
    waits = pool.ask(A, "alive")
    pool.placement.holder_died("dead", pool.now)
    (stop,) = pool.placement.decide(pool.now)
    assert stop == Stop(0)
    pool.settle()
    assert pool.server_of(waits) is None
    pool.placement.stopped(0, pool.now)
    pool.settle()
    assert pool.server_of(waits) == 0


def test_a_lost_server_is_brought_back_once() -> None:
    pool = Pool(limit=1)
    pool.ask(A)
    incarnation = pool.placement.servers[0].incarnation
    for _ in range(3):
        pool.placement.lost(0, incarnation)
        pool.settle()
    assert pool.served() == [(0, "a"), (0, "a")]


def test_leases_that_were_promised_on_a_dead_server_wait_again_and_the_pool_grows_anew() -> None:
    placement = Placement(Policy(limit=1))
    placement.asked(Ask(1, "x", A, False, 0))
    placement.decide(0)
    placement.placed(0, 0)
    assert placement.decide(0) == [Serve(0, A)]
    assert placement.died(0) == []
    assert placement.decide(1) == [Grow(1)]


def test_idle_servers_go_until_the_minimum_is_left() -> None:
    pool = Pool(limit=3, minimum=1, idle_timeout_s=100)
    for lease in [pool.ask(A), pool.ask(A1), pool.ask(A2)]:
        pool.end(lease)
    pool.settle(99)
    assert len(pool.placement.servers) == 3
    pool.settle(1)
    assert len(pool.placement.servers) == 1
    assert sum(isinstance(action, Release) for action in pool.done) == 2


class RandomEvents(RuleBasedStateMachine):
    """Whatever happens in whatever order, the laws hold after each decision."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.placement = Placement(Policy(limit=3, turn_s=10, patience_s=5, idle_timeout_s=50))
        self.numbers = itertools.count(1)
        self.asked: dict[int, Ask] = {}
        self.ended: set[int] = set()
        self.granted: dict[int, int] = {}

    def decide(self) -> None:
        for action in self.placement.decide(self.now):
            match action:
                case Grant(ask, number):
                    server = self.placement.servers[number]
                    assert ask.lease not in self.granted, "granted twice"
                    assert server.state is State.READY
                    assert ask.exclusive or server.serves(ask.weights), "a lease begins on the weights it is for"
                    self.granted[ask.lease] = number
                case Revoke(ask):
                    self.ended.add(ask.lease)
                case Serve(number):
                    assert self.placement.servers[number].training is None, "nobody swaps under a training"
                case Stop(number) | Grow(number):
                    assert number in self.placement.servers
                case Release(number):
                    assert number not in self.placement.servers

    def in_state(self, state: State) -> list[Server]:
        return [server for server in self.placement.servers.values() if server.state is state]

    @rule(weights=st.sampled_from(ALL_WEIGHTS), exclusive=st.booleans(), holder=st.sampled_from("xyz"))
    def ask(self, weights: Weights, exclusive: bool, holder: str) -> None:
        ask = Ask(next(self.numbers), holder, weights, exclusive, self.now)
        self.asked[ask.lease] = ask
        self.placement.asked(ask)
        self.decide()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.asked)))
        self.ended.add(lease)
        self.placement.ended(lease, self.now)
        self.decide()

    @rule(holder=st.sampled_from("xyz"))
    def die(self, holder: str) -> None:
        self.placement.holder_died(holder, self.now)
        self.ended |= {lease for lease, ask in self.asked.items() if ask.holder == holder}
        self.decide()

    @precondition(lambda self: self.placement.servers)
    @rule(data=st.data(), fails=st.booleans())
    def progress(self, data: st.DataObject, fails: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.placement.servers)))
        match self.placement.servers[number].state:
            case State.PLACING:
                self.placement.placed(number, self.now)
            case State.CHANGING if fails:
                self.ended |= {ask.lease for ask in self.placement.failed(number, self.now)}
            case State.CHANGING:
                self.placement.served(number, self.now)
            case State.STOPPING:
                self.placement.stopped(number, self.now)
        self.decide()

    @precondition(lambda self: self.placement.servers)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.placement.servers)))
        self.placement.lost(number, self.placement.servers[number].incarnation - data.draw(st.integers(0, 1)))
        self.decide()

    @precondition(lambda self: self.placement.servers)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.placement.servers)))
        self.ended |= {ask.lease for ask in self.placement.died(number)}
        self.decide()

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.decide()

    @invariant()
    def a_server_trains_alone_and_serves_one_version(self) -> None:
        for server in self.placement.servers.values():
            assert not (server.training and server.leases)
            assert all(server.serves(ask.weights) for ask in server.leases.values())

    @invariant()
    def every_lease_is_in_one_place(self) -> None:
        servers = self.placement.servers.values()
        held = [lease for server in servers for lease in server.leases]
        held += [server.training.lease for server in servers if server.training]
        held += [ask.lease for ask in self.placement.waiting]
        assert len(held) == len(set(held))
        assert set(held) == self.asked.keys() - self.ended

    @invariant()
    def no_server_idles_while_a_lease_waits_that_it_could_serve(self) -> None:
        may_grow = len(self.placement.servers) < 3 or bool(self.in_state(State.PLACING))
        for server in (server for server in self.placement.servers.values() if server.free):
            for ask in self.placement.waiting:
                other_base = not ask.exclusive and server.base not in (None, ask.weights.base)
                assert other_base, "it could have been served"
                assert may_grow, "there is nothing better to wait for"

    @invariant()
    def there_are_no_more_servers_than_the_limit(self) -> None:
        assert len(self.placement.servers) <= 3


TestRandomEvents = RandomEvents.TestCase
TestRandomEvents.settings = hypothesis_settings(max_examples=150, stateful_step_count=60, deadline=None)


@dataclass
class Simulation:
    """Trials that take leases of random kinds, on servers that take their time, fail and die.

    Shared leases that nobody revokes last for ever with probability `greedy`: only taking them back helps those who wait.
    """

    chance: random.Random
    limit: int
    greedy: float = 0.1
    now: float = 0.0
    longest_wait: float = 0.0
    granted: int = 0
    active: int = 0
    asks: dict[int, Ask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.placement = Placement(Policy(self.limit, turn_s=60, patience_s=30, idle_timeout_s=300))
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.numbers = itertools.count(1)

    def at(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + seconds, next(self.order), happens))

    def run(self, leases: int, trials: int) -> None:
        for _ in range(trials):
            self.at(self.chance.uniform(0, 50), self.ask)
        self.at(1, self.tick)
        while self.granted < leases:
            self.now, _, happens = heapq.heappop(self.queue)
            happens()
            self.decide()

    def tick(self) -> None:
        self.at(1, self.tick)
        waits = [self.now - ask.since for ask in self.placement.waiting]
        self.longest_wait = max([self.longest_wait, *waits])
        if self.placement.servers and self.chance.random() < 0.002:
            number = self.chance.choice(sorted(self.placement.servers))
            for ask in self.placement.died(number):
                self.gone(ask)

    def ask(self) -> None:
        ask = Ask(
            next(self.numbers),
            f"h{self.chance.random()}",
            self.chance.choice(ALL_WEIGHTS),
            self.chance.random() < 0.3,
            self.now,
        )
        self.asks[ask.lease] = ask
        self.placement.asked(ask)

    def gone(self, ask: Ask) -> None:
        """The lease is over: its trial goes on to the next."""
        if self.asks.pop(ask.lease, None) is not None:
            self.at(self.chance.uniform(0, 5), self.ask)

    def over(self, ask: Ask) -> None:
        if ask.lease in self.asks:
            if ask.exclusive and self.chance.random() < 0.05:
                self.placement.holder_died(ask.holder, self.now)
            else:
                self.placement.ended(ask.lease, self.now)
            self.gone(ask)

    def decide(self) -> None:
        for action in self.placement.decide(self.now):
            match action:
                case Grow(number):
                    self.at(self.chance.uniform(1, 200), lambda n=number: self.placement.placed(n, self.now))
                case Serve(number):
                    self.at(self.chance.choice([0.3, 30]), lambda n=number: self.come_up(n))
                case Stop(number):
                    self.at(0.5, lambda n=number: self.placement.stopped(n, self.now))
                case Revoke(ask):
                    self.gone(ask)
                case Grant(ask):
                    self.granted += 1
                    if ask.exclusive or self.chance.random() > self.greedy:
                        self.at(self.chance.uniform(1, 40), lambda a=ask: self.over(a))

    def come_up(self, number: int) -> None:
        if self.chance.random() < 0.03:
            for ask in self.placement.failed(number, self.now):
                self.gone(ask)
        else:
            self.placement.served(number, self.now)


@pytest.mark.parametrize(("seed", "limit", "trials"), [(0, 1, 2), (1, 1, 6), (2, 2, 8), (3, 4, 8), (4, 8, 40), (5, 3, 3)])
def test_in_thousands_of_random_leases_nobody_starves(seed: int, limit: int, trials: int) -> None:
    simulation = Simulation(random.Random(seed), limit)
    simulation.run(3000, trials)
    # Before each of those that asked earlier there may be a turn, a change of weights, and a server that died and is placed.
    ahead = -(-trials // limit)
    assert simulation.longest_wait <= ahead * (60 + 30 + 40) + 2 * 200 + 30
    holding = sum(len(s.leases) + (s.training is not None) for s in simulation.placement.servers.values())
    assert holding + len(simulation.placement.waiting) == len(simulation.asks), "leases are conserved"
