"""The pool's decisions in simulations of thousands of leases, with servers that take their time, fail and die."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from bt_ray.pool.policy import Placement
from bt_ray.pool.policy_types import Ask, Grant, Grow, Policy, Revoke, Serve, Stop
from bt_ray.weights import Weights

A, B = Weights("a", "a"), Weights("b", "b")
MERGED = (A, Weights("a-ft-1", "1", "a"), Weights("a-ft-2", "2", "a"), B)
ADAPTED = (A, *(Weights(f"a-ft-{n}", f"{n}", "a", on=A) for n in (1, 2, 3)), B)


@dataclass
class Simulation:
    """Trials that take leases of random kinds, on servers that take their time, fail and die.

    Shared leases that nobody revokes last for ever with probability `greedy`: only taking them back helps those who wait.
    """

    chance: random.Random
    limit: int
    adapters: int = 0
    greedy: float = 0.1
    now: float = 0.0
    longest_wait: float = 0.0
    granted: int = 0
    active: int = 0
    asks: dict[int, Ask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.placement = Placement(
            {"": Policy(self.limit, turn_s=60, patience_s=30, idle_timeout_s=300, adapters=self.adapters)}
        )
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
            for ask in self.placement.note_died(number):
                self.gone(ask)

    def ask(self) -> None:
        ask = Ask(
            next(self.numbers),
            f"h{self.chance.random()}",
            self.chance.choice(ADAPTED if self.adapters else MERGED),
            self.chance.random() < 0.3,
            self.now,
        )
        self.asks[ask.lease] = ask
        self.placement.add_ask(ask)

    def gone(self, ask: Ask) -> None:
        """The lease is over: its trial goes on to the next."""
        if self.asks.pop(ask.lease, None) is not None:
            self.at(self.chance.uniform(0, 5), self.ask)

    def over(self, ask: Ask) -> None:
        if ask.lease in self.asks:
            if ask.exclusive and self.chance.random() < 0.05:
                self.placement.note_holder_died(ask.holder, self.now)
            else:
                self.placement.end_lease(ask.lease, self.now)
            self.gone(ask)

    def decide(self) -> None:
        for action in self.placement.decide(self.now):
            match action:
                case Grow(number):
                    self.at(self.chance.uniform(1, 200), lambda n=number: self.placement.note_placed(n, self.now))
                case Serve(number):
                    self.at(self.chance.choice([0.3, 30]), lambda n=number: self.come_up(n))
                case Stop(number):
                    self.at(0.5, lambda n=number: self.placement.note_stopped(n, self.now))
                case Revoke(ask):
                    self.gone(ask)
                case Grant(ask):
                    self.granted += 1
                    if ask.exclusive or self.chance.random() > self.greedy:
                        self.at(self.chance.uniform(1, 40), lambda a=ask: self.over(a))

    def come_up(self, number: int) -> None:
        if self.chance.random() < 0.03:
            for ask in self.placement.note_failed(number, self.now):
                self.gone(ask)
        else:
            self.placement.note_served(number, self.now)


@pytest.mark.parametrize("adapters", [0, 2])
@pytest.mark.parametrize(("seed", "limit", "trials"), [(0, 1, 2), (1, 1, 6), (2, 2, 8), (3, 4, 8), (4, 8, 40), (5, 3, 3)])
def test_in_thousands_of_random_leases_nobody_starves(seed: int, limit: int, trials: int, adapters: int) -> None:
    simulation = Simulation(random.Random(seed), limit, adapters)
    simulation.run(3000, trials)
    # Before each of those that asked earlier there may be a turn, a change of weights, and a server that died and is placed.
    ahead = -(-trials // limit)
    assert simulation.longest_wait <= ahead * (60 + 30 + 40) + 2 * 200 + 30
    holding = sum(len(s.leases) + (s.training is not None) for s in simulation.placement.servers.values())
    assert holding + len(simulation.placement.waiting) == len(simulation.asks), "leases are conserved"
