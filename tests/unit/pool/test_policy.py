"""The pool's decisions: examples of each preference, and laws under random events."""

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bt_ray.pool.policy import Placement
from bt_ray.pool.policy_types import Action, Ask, Fetch, Grant, Grow, Policy, Release, Revoke, Serve, Server, State, Stop
from bt_ray.weights import Weights

A, A1, A2 = Weights("a", "a"), Weights("a-ft-1", "1", "a"), Weights("a-ft-2", "2", "a")
A3, A4 = Weights("a-ft-3", "3", "a"), Weights("a-ft-4", "4", "a")
B = Weights("b", "b")
BIG, BIG1 = Weights("big-0", "big"), Weights("big-0-ft-1", "3", "big-0")
"""Of a model that may have slots of its own."""
ALL_WEIGHTS = (A, A1, A2, B)
X1, X2, X3 = (Weights(f"a-ft-x{n}", f"x{n}", "a", on=A) for n in (1, 2, 3))
"""Adapters on A."""


class Pool:
    """A placement, and a clock, with servers that do at once what they are told."""

    def __init__(self, first: Weights | None = None, node: str | None = None, **policy: float) -> None:
        policies = {"": Policy(**{"limit": 1, "turn_s": 60, "patience_s": 30, **policy})}  # type: ignore[arg-type]
        self.placement = Placement(policies, {"": first} if first else None)
        self.node = node
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.done: list[Action] = []

    def ask(
        self, weights: Weights, holder: str = "trial", *, exclusive: bool = False, urgency: int = 0, goes_on: bool = False
    ) -> int:
        lease = next(self.numbers)
        self.placement.add_ask(Ask(lease, holder, weights, exclusive, self.now, urgency, goes_on))
        self.settle()
        return lease

    def end(self, lease: int, made: Weights | None = None) -> None:
        self.placement.end_lease(lease, self.now, made)
        self.settle()

    def settle(self, seconds: float = 0) -> None:
        self.now += seconds
        while actions := self.placement.decide(self.now):
            self.done += actions
            for action in actions:
                match action:
                    case Grow(number):
                        self.placement.note_placed(number, self.now, self.node)
                    case Serve(number):
                        self.placement.note_served(number, self.now)
                    case Fetch(number, weights):
                        self.placement.note_fetched(number, weights, whole=True)
                    case Stop(number):
                        self.placement.note_stopped(number, self.now)

    def server_of(self, lease: int) -> int | None:
        """Where a lease was granted."""
        return next((a.server for a in reversed(self.done) if isinstance(a, Grant) and a.lease.lease == lease), None)

    def served(self) -> list[tuple[int, str]]:
        return [(action.server, action.weights.id) for action in self.done if isinstance(action, Serve)]

    def fetched(self) -> list[tuple[int, Weights]]:
        return [(action.server, action.weights) for action in self.done if isinstance(action, Fetch)]


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
    pool.placement.policies = {"": Policy(limit=2)}
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

    slow = Placement({"": Policy(limit=2, patience_s=30)})
    server = slow.grow(0)
    slow.note_placed(server.number, 0)
    slow.add_ask(Ask(1, "x", A, False, 0))
    assert slow.decide(0)[1:] == [Serve(0, A)]
    slow.note_served(0, 1)
    slow.end_lease(1, 2)
    slow.add_ask(Ask(2, "x", B, False, 2))
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
    placement = Placement({"": Policy(limit=1)})
    placement.add_ask(Ask(1, "x", A, False, 0))
    assert placement.decide(0) == [Grow(0)]
    placement.note_placed(0, 1)
    assert placement.decide(1) == [Serve(0, A)]
    placement.add_ask(Ask(2, "y", A, False, 2))
    assert placement.decide(2) == []
    placement.note_served(0, 3)
    assert [action.lease.lease for action in placement.decide(3) if isinstance(action, Grant)] == [1, 2]


def test_a_lease_that_was_promised_when_its_server_is_taken_back_waits_on() -> None:
    pool = Pool(limit=1, turn_s=60)
    pool.ask(A)
    pool.now += 60
    later = [Ask(next(pool.numbers), "x", A, False, pool.now), Ask(next(pool.numbers), "y", A, True, pool.now)]
    for ask in later:
        pool.placement.add_ask(ask)
    pool.settle()
    joined, training = (ask.lease for ask in later)
    assert (pool.server_of(joined), pool.server_of(training)) == (None, 0)
    pool.end(training)
    assert pool.server_of(joined) == 0


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
    assert pool.placement.end_lease(training, pool.now)
    assert not pool.placement.end_lease(training, pool.now), "it has ended before"
    pool.settle()
    assert pool.server_of(others[1]) == 0, "trainings come first"
    pool.end(others[1])
    assert pool.server_of(others[0]) == 0


def test_the_longest_way_to_go_comes_first_then_who_goes_on_then_trainings_then_who_asked_first() -> None:
    pool = Pool(limit=1)
    held = pool.ask(B, exclusive=True)
    asked = [
        pool.ask(A, urgency=1),
        pool.ask(A, urgency=1, exclusive=True),
        pool.ask(A, urgency=3, exclusive=True),
        pool.ask(A1, urgency=3),
        pool.ask(A2, urgency=3, exclusive=True),
        pool.ask(A2, urgency=1, goes_on=True),
    ]
    granted = []
    while asked:
        pool.end(held)
        (held,) = [lease for lease in asked if pool.server_of(lease) is not None]
        asked.remove(held)
        granted.append(held)
    assert granted == [4, 6, 5, 7, 3, 2]


def test_a_dead_holders_training_is_stopped_before_anybody_else_gets_the_server() -> None:
    pool = Pool(limit=1)
    pool.ask(A, "dead", exclusive=True)
    waits = pool.ask(A, "alive")
    pool.placement.note_holder_died("dead", pool.now)
    (stop,) = pool.placement.decide(pool.now)
    assert stop == Stop(0)
    pool.settle()
    assert pool.server_of(waits) is None
    pool.placement.note_stopped(0, pool.now)
    pool.settle()
    assert pool.server_of(waits) == 0


def test_a_lost_server_is_brought_back_once() -> None:
    pool = Pool(limit=1)
    pool.ask(A)
    incarnation = pool.placement.servers[0].incarnation
    for _ in range(3):
        pool.placement.note_lost(0, incarnation)
        pool.settle()
    assert pool.served() == [(0, "a"), (0, "a")]


def test_leases_that_were_promised_on_a_dead_server_wait_again_and_the_pool_grows_anew() -> None:
    placement = Placement({"": Policy(limit=1)})
    placement.add_ask(Ask(1, "x", A, False, 0))
    placement.decide(0)
    placement.note_placed(0, 0)
    assert placement.decide(0) == [Serve(0, A)]
    assert placement.note_died(0) == []
    assert placement.decide(1) == [Grow(1)]


def test_what_all_ask_for_at_first_is_started_before_they_ask_in_one_server_and_then_in_the_others() -> None:
    placement = Placement({"": Policy(limit=3)}, {"": A})
    for _ in range(3):
        placement.note_placed(placement.grow(0).number, 0)
    assert placement.decide(0) == [Grow(0), Grow(1), Grow(2), Serve(0, A)]
    placement.add_ask(Ask(1, "x", A1, True, 1))
    assert [action for action in placement.decide(1) if isinstance(action, Grant)] == [Grant(Ask(1, "x", A1, True, 1), 1)]
    placement.note_served(0, 2)
    assert placement.decide(2) == [Serve(2, A)], "not the one that trains"
    assert placement.note_failed(2, 3) == []
    placement.end_lease(1, 3)
    assert placement.decide(3) == [Serve(1, A)], "not again what failed"
    placement.note_served(1, 4)
    assert placement.decide(4) == []


def test_who_asks_first_gets_the_server_that_was_started_ahead() -> None:
    placement = Placement({"": Policy(limit=2)}, {"": A})
    for _ in range(2):
        placement.note_placed(placement.grow(0).number, 0)
    placement.decide(0)
    first, second = (Ask(number, "x", A, False, number) for number in (1, 2))
    placement.add_ask(first)
    assert placement.decide(1) == [], "not a start of the other one"
    placement.add_ask(second)
    assert placement.decide(2) == [Serve(1, A)], "which is for the next"
    placement.note_served(0, 3)
    assert placement.decide(3) == [Grant(first, 0)]


def test_a_server_that_would_end_with_the_first_training_is_not_started_ahead_but_for_the_first() -> None:
    pool = Pool(first=A, limit=2, stays_up=False)
    for _ in range(2):
        pool.placement.grow(pool.now)
    pool.settle()
    assert pool.served() == [(0, "a")]
    training = pool.ask(A, exclusive=True)
    assert pool.server_of(training) == 1
    pool.end(training)
    assert pool.server_of(pool.ask(A)) == 0
    assert pool.served() == [(0, "a")]


def test_weights_that_are_waited_for_are_fetched_to_the_servers_that_are_next_in_line() -> None:
    pool = Pool(limit=3)
    training, first, second = pool.ask(A, exclusive=True), pool.ask(A), pool.ask(B)
    servers = [pool.server_of(lease) for lease in (training, first, second)]
    for weights in (A1, A2, A1):
        pool.ask(weights, exclusive=True)
    assert pool.fetched() == [(servers[1], A1), (servers[2], A2)], "requests end before trainings"
    for weights in (A3, A4, B):
        pool.ask(weights, exclusive=True)
    assert pool.fetched()[2:] == [(servers[0], A3)], "there is no server for the fourth, and a base needs none"
    pool.end(second)
    assert pool.server_of(second + 1) == servers[2], "whoever waits longest gets what is free, wherever the copies are"


def test_a_server_fetches_one_after_the_other_and_no_more_once_that_failed() -> None:
    placement = Placement({"": Policy(limit=1)})
    placement.note_placed(placement.grow(0).number, 0)
    placement.add_ask(Ask(1, "x", A, True, 0))
    placement.decide(0)
    for lease, weights, expected in [(2, A1, [Fetch(0, A1)]), (3, A2, [])]:
        placement.add_ask(Ask(lease, "x", weights, True, 0))
        assert placement.decide(0) == expected
        placement.end_lease(2, 0)
    placement.note_fetched(0, A1, whole=True)
    assert placement.decide(0) == [Fetch(0, A2)]
    placement.note_fetched(0, A2, whole=False)
    assert placement.decide(0) == []


def test_weights_are_not_fetched_to_a_node_that_has_them_nor_while_a_new_server_comes() -> None:
    pool = Pool(limit=2, node="one")
    pool.end(pool.ask(A, exclusive=True), made=A1)
    held = [pool.ask(A, exclusive=True), pool.ask(A, exclusive=True)]
    waiting = pool.ask(A1)
    assert pool.fetched() == []
    pool.end(held[0])
    assert pool.server_of(waiting) is not None
    pool.placement.policies = {"": Policy(limit=3)}
    pool.placement.add_ask(Ask(100, "x", A2, True, pool.now))
    assert [type(action) for action in pool.placement.decide(pool.now)] == [Grow]


@pytest.mark.parametrize("exclusive", [False, True])
def test_of_free_servers_one_goes_first_whose_node_has_the_weights(exclusive: bool) -> None:
    pool = Pool(limit=3)
    trainings = [pool.ask(A, exclusive=True) for _ in range(3)]
    servers = [pool.server_of(lease) for lease in trainings]
    for lease, made in zip(trainings, (A1, A2, A3), strict=True):
        pool.end(lease, made=made)
    assert pool.server_of(pool.ask(A3, exclusive=exclusive)) == servers[2]
    assert pool.server_of(pool.ask(A2, exclusive=exclusive)) == servers[1]


def test_what_failed_on_one_node_is_tried_on_another() -> None:
    pool = Pool(limit=2)
    for lease in [pool.ask(A, exclusive=True), pool.ask(A, exclusive=True)]:
        pool.end(lease, made=A1)
    tried = []
    for _ in range(2):
        training = pool.ask(A1, exclusive=True)
        tried.append(pool.server_of(training))
        pool.now += 1
        pool.end(training)
    assert set(tried) == {0, 1}, "a training"
    tried = []
    for _ in range(2):
        pool.placement.add_ask(Ask(100 + len(tried), "x", A1, False, pool.now))
        (serve,) = pool.placement.decide(pool.now)
        assert isinstance(serve, Serve)
        pool.now += 1
        pool.placement.note_failed(serve.server, pool.now)
        tried.append(serve.server)
    assert set(tried) == {0, 1}, "a server"


def test_idle_servers_go_until_the_minimum_is_left() -> None:
    pool = Pool(limit=3, minimum=1, idle_timeout_s=100)
    for lease in [pool.ask(A), pool.ask(A1), pool.ask(A2)]:
        pool.end(lease)
    pool.settle(99)
    assert len(pool.placement.servers) == 3
    pool.settle(1)
    assert len(pool.placement.servers) == 1
    assert sum(isinstance(action, Release) for action in pool.done) == 2


def test_one_server_serves_several_adapters_at_once_and_their_base() -> None:
    pool = Pool(limit=1, adapters=2)
    leases = [pool.ask(weights) for weights in (X1, A, X2, X1)]
    assert [pool.server_of(lease) for lease in leases] == [0, 0, 0, 0]
    assert [(serve.weights.id, [w.id for w in serve.beside]) for serve in pool.done if isinstance(serve, Serve)] == [
        ("a-ft-x1", ["a"]),
        ("a-ft-x2", ["a-ft-x1", "a"]),
    ]
    third = pool.ask(X3)
    assert pool.server_of(third) is None, "there is room for two"
    for lease in (leases[0], leases[3]):
        pool.end(lease)
    assert pool.server_of(third) == 0
    assert not [action for action in pool.done if isinstance(action, Revoke)]


def test_adapters_that_keep_coming_do_not_renew_a_servers_turn() -> None:
    pool = Pool(limit=1, adapters=2, turn_s=60)
    pool.ask(A)
    training = pool.ask(A, exclusive=True)
    for _ in range(30):
        for adapter in (X1, X2):
            pool.end(pool.ask(adapter))
            pool.settle(2)
    assert pool.server_of(training) == 0


def test_a_lost_server_is_brought_back_with_all_that_it_served() -> None:
    pool = Pool(limit=1, adapters=2)
    for weights in (X1, X2):
        pool.ask(weights)
    pool.placement.note_lost(0, pool.placement.servers[0].incarnation)
    (serve,) = pool.placement.decide(pool.now)
    assert isinstance(serve, Serve)
    assert {serve.weights.id, *(weights.id for weights in serve.beside)} == {"a", "a-ft-x1", "a-ft-x2"}


def test_a_model_has_slots_of_its_own_and_no_other_model_gets_them() -> None:
    pool = Pool(limit=1)
    pool.placement.policies = {"": Policy(limit=1), "big": Policy(limit=1, minimum=0, idle_timeout_s=100)}
    assert pool.server_of(pool.ask(A, exclusive=True)) == 0
    large = [pool.ask(BIG), pool.ask(BIG)]
    assert [pool.server_of(lease) for lease in large] == [1, 1]
    assert pool.server_of(pool.ask(A1)) is None, "the other slot is not for it"
    for lease in large:
        pool.end(lease)
    pool.settle(100)
    assert [action.server for action in pool.done if isinstance(action, Release)] == [1], "whatever waits elsewhere"


def test_a_server_whose_node_goes_away_keeps_what_it_does_and_gets_nothing_new() -> None:
    pool = Pool(limit=1)
    training = pool.ask(A, exclusive=True)
    waiting = pool.ask(B)
    assert (pool.server_of(training), pool.server_of(waiting)) == (0, None)
    pool.placement.note_leaving(0, pool.now)
    pool.settle(1)
    assert (pool.server_of(training), pool.server_of(waiting)) == (0, 1), "another server in its place, at once"
    pool.end(training)
    assert Release(0, leaving=True) in pool.done
    pool.placement.note_leaving(1, pool.now)
    pool.end(waiting)
    assert pool.server_of(pool.ask(B)) == 2


class RandomEvents(RuleBasedStateMachine):
    """Whatever happens in whatever order, the laws hold after each decision."""

    weights = ALL_WEIGHTS
    adapters = 0
    limits: ClassVar = {"": 3}
    first: ClassVar[dict[str, Weights]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        policy = Policy(limit=0, turn_s=10, patience_s=5, idle_timeout_s=50, adapters=self.adapters)
        policies = {slots: replace(policy, limit=limit) for slots, limit in self.limits.items()}
        self.placement = Placement(policies, self.first)
        self.numbers = itertools.count(1)
        self.asked: dict[int, Ask] = {}
        self.ended: set[int] = set()
        self.granted: dict[int, int] = {}
        self.fetching: list[Server] = []

    def decide(self) -> None:
        for action in self.placement.decide(self.now):
            match action:
                case Grant(ask, number):
                    server = self.placement.servers[number]
                    assert ask.lease not in self.granted, "granted twice"
                    assert not server.leaving, "nobody is sent to a node that is going away"
                    assert server.state is State.READY
                    assert ask.exclusive or server.serves(ask.weights), "a lease begins on the weights it is for"
                    self.granted[ask.lease] = number
                case Revoke(ask):
                    assert ask.lease in self.granted, "who still waits for a lease would never hear of it"
                    self.ended.add(ask.lease)
                case Serve(number, weights, beside):
                    server = self.placement.servers[number]
                    assert server.training is None, "nobody swaps under a training"
                    served = {weights.id, *(other.id for other in beside)}
                    assert {ask.weights.id for ask in server.leases.values()} <= served, "nobody loses what its lease is for"
                case Fetch(number, weights):
                    server = self.placement.servers[number]
                    assert server.work, "nothing is fetched ahead to a server that is free"
                    assert not server.leaving
                    assert weights.id in {ask.weights.id for ask in self.placement.waiting}
                    assert server not in self.fetching, "one at a time"
                    self.fetching.append(server)
                case Stop(number) | Grow(number):
                    assert number in self.placement.servers
                case Release(number):
                    assert number not in self.placement.servers

    def slots(self, weights: Weights) -> str:
        return weights.model if weights.model in self.limits else ""

    def staying(self, slots: str) -> list[Server]:
        return [server for server in self.placement.servers.values() if server.slots == slots and not server.leaving]

    def in_state(self, state: State) -> list[Server]:
        return [server for server in self.placement.servers.values() if server.state is state]

    @rule(data=st.data(), exclusive=st.booleans(), holder=st.sampled_from("xyz"), urgency=st.integers(0, 2))
    def ask(self, data: st.DataObject, exclusive: bool, holder: str, urgency: int) -> None:
        weights = data.draw(st.sampled_from(self.weights))
        ask = Ask(next(self.numbers), holder, weights, exclusive, self.now, urgency)
        self.asked[ask.lease] = ask
        self.placement.add_ask(ask)
        self.decide()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.asked)))
        self.ended.add(lease)
        self.placement.end_lease(lease, self.now, data.draw(st.sampled_from([None, *self.weights])))
        self.decide()

    @precondition(lambda self: self.fetching)
    @rule(whole=st.booleans())
    def fetched(self, whole: bool) -> None:
        server = self.fetching.pop(0)
        self.placement.note_fetched(server.number, server.fetching or A1, whole=whole)
        self.decide()

    @rule(holder=st.sampled_from("xyz"))
    def die(self, holder: str) -> None:
        self.placement.note_holder_died(holder, self.now)
        self.ended |= {lease for lease, ask in self.asked.items() if ask.holder == holder}
        self.decide()

    @precondition(lambda self: self.placement.servers)
    @rule(data=st.data(), fails=st.booleans())
    def progress(self, data: st.DataObject, fails: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.placement.servers)))
        match self.placement.servers[number].state:
            case State.PLACING:
                self.placement.note_placed(number, self.now, f"node {number % 2}")
            case State.CHANGING if fails:
                self.ended |= {ask.lease for ask in self.placement.note_failed(number, self.now)}
            case State.CHANGING:
                self.placement.note_served(number, self.now)
            case State.STOPPING:
                self.placement.note_stopped(number, self.now)
        self.decide()

    @precondition(lambda self: self.placement.servers)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.placement.servers)))
        self.placement.note_lost(number, self.placement.servers[number].incarnation - data.draw(st.integers(0, 1)))
        self.decide()

    @precondition(lambda self: self.placement.servers)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.placement.servers)))
        self.ended |= {ask.lease for ask in self.placement.note_died(number)}
        self.decide()

    @precondition(lambda self: self.placement.servers)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        self.placement.note_leaving(data.draw(st.sampled_from(sorted(self.placement.servers))), self.now)
        self.decide()

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.decide()

    @invariant()
    def a_server_trains_alone_and_serves_as_much_as_it_can_at_once(self) -> None:
        for server in self.placement.servers.values():
            assert not (server.training and server.leases)
            assert all(server.serves(ask.weights) for ask in server.leases.values())
            assert {self.slots(weights) for weights in server.serving.values()} <= {server.slots}
            assert sum(weights.on is not None for weights in server.serving.values()) <= self.adapters
            assert sum(weights.on is None for weights in server.serving.values()) <= 1

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
        for server in (server for server in self.placement.servers.values() if server.free):
            staying = self.staying(server.slots)
            may_grow = len(staying) < self.limits[server.slots] or any(s.state is State.PLACING for s in staying)
            for ask in (ask for ask in self.placement.waiting if self.slots(ask.weights) == server.slots):
                other_base = not ask.exclusive and server.base not in (None, ask.weights.base)
                assert other_base, "it could have been served"
                assert may_grow, "there is nothing better to wait for"

    @invariant()
    def no_adapter_waits_that_a_server_has_room_for(self) -> None:
        for server in (server for server in self.in_state(State.READY) if not server.leaving):
            adapters = {ask.weights.id for ask in server.leases.values() if ask.weights.on is not None}
            for ask in self.placement.waiting:
                if server.leases and not ask.exclusive and ask.weights.on is not None and ask.weights.base == server.base:
                    assert len(adapters) == self.adapters

    @invariant()
    def there_are_no_more_servers_than_the_limit(self) -> None:
        for slots, limit in self.limits.items():
            assert len(self.staying(slots)) <= limit

    @invariant()
    def a_server_that_leaves_goes_when_nothing_is_on_it(self) -> None:
        for server in self.in_state(State.READY):
            assert not server.leaving or server.leases or server.training


class RandomEventsWithSlotsOfAModelsOwn(RandomEvents):
    weights = (A, A1, BIG, BIG1)
    limits: ClassVar = {"": 2, "big": 2}
    first: ClassVar = {"": A, "big": BIG}


class RandomEventsWithAdapters(RandomEvents):
    weights = (A, X1, X2, X3, B)
    adapters = 2
    first: ClassVar = {"": A}


TestRandomEvents = RandomEvents.TestCase
TestRandomEventsWithAdapters = RandomEventsWithAdapters.TestCase
TestRandomEventsWithSlotsOfAModelsOwn = RandomEventsWithSlotsOfAModelsOwn.TestCase
for case in (TestRandomEvents, TestRandomEventsWithAdapters, TestRandomEventsWithSlotsOfAModelsOwn):
    case.settings = hypothesis_settings(max_examples=150, stateful_step_count=60)
