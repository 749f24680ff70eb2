"""A sweep in simulated time, around the decisions of the real one: the pool's, the claims on steps, the order of trials."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from bt_ray.pool.policy import Placement
from bt_ray.pool.policy_types import Action, Ask, Fetch, Grant, Grow, Policy, Release, Revoke, Serve, Stop
from bt_ray.strategy import BASELINE, SEPARATOR, all_prefixes, parent, prefixes, start_order, steps_to_come
from bt_ray.trial.claims import ClaimTable
from bt_ray.weights import Weights
from simulation.schedules import lower_bound, trains

TICK_S = 1.0
"""As the pool's: time alone may be a reason to act."""
BASE = Weights("model-0", "model")
Process = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True)
class Times:
    """Medians in seconds.

    Attributes:
        start: Of a server, until it answers.
        swap: To other weights in place, verified.
        news: Until a trial that waited for a step goes on.
        fetch: Of a fine-tune to a node that has no copy of it; each slot has a node of its own.
        train: One fine-tune.
        prompt: The requests of a prompt optimizer, on a server alone.
        evaluate: Those of an evaluation.
        grow: Until a slot that was asked for can be used.
        trial: Until a trial's process is at work.
        spread: The standard deviation of the logarithm of each of them.
        checkpoint: Between two checkpoints of a training.
        preempted: Mean time until a slot is lost; infinite if none is.
    """

    start: float = 24.0
    swap: float = 0.5
    news: float = 0.3
    fetch: float = 0.0
    train: float = 150.0
    prompt: float = 120.0
    evaluate: float = 20.0
    grow: float = 0.0
    trial: float = 2.5
    spread: float = 0.2
    checkpoint: float = 300.0
    preempted: float = math.inf


@dataclass(frozen=True)
class Switches:
    """How the sweep is run.

    Attributes:
        trials_per_slot: Trials at a time, for each slot.
        batching: Evaluations that a server answers at once as fast as one alone.
        in_start_order: Whether trials start as a sweep starts them, rather than in the order given.
        longest_first: Whether the leases of steps with more steps after them come first.
        turn_s: As `server.turn_s`.
        patience_s: As the pool's.
        renew_s: Seconds after which a trial asks for its lease anew, as another server may be free.
        idle_timeout_s: As `server.idle_timeout_s`.
        stays_up: Whether a server keeps its model during a training.
        adapters: Adapters served at once; 0: merged checkpoints.
        grows: Whether slots are asked for one by one, as they are wanted, rather than all at once.
        starts_ahead: Whether servers are started with the base before anybody asks for it.
        fetches_ahead: Whether a fine-tune that is waited for is fetched before a server is free for it.
    """

    trials_per_slot: int = 2
    batching: float = 1.0
    in_start_order: bool = True
    longest_first: bool = True
    turn_s: float = 60.0
    patience_s: float = 30.0
    renew_s: float = 60.0
    idle_timeout_s: float = 300.0
    stays_up: bool = True
    adapters: int = 0
    grows: bool = False
    starts_ahead: bool = True
    fetches_ahead: bool = True

    def policy(self, slots: int) -> Policy:
        return Policy(
            limit=slots,
            minimum=1 if self.grows else slots,
            turn_s=self.turn_s,
            patience_s=self.patience_s,
            idle_timeout_s=self.idle_timeout_s,
            stays_up=self.stays_up,
            adapters=self.adapters,
        )


@dataclass(frozen=True)
class Outcome:
    """What a simulated sweep took.

    Attributes:
        makespan: Seconds until the last step is committed.
        bound: Seconds that no schedule of these steps can beat.
        slot_seconds: How long slots were held.
        busy_seconds: How long they answered or trained.
        steps: Steps, the baseline included.
        starts: Of servers.
        swaps: Of weights.
        lost: Slots that were preempted.
    """

    makespan: float
    bound: float
    slot_seconds: float
    busy_seconds: float
    steps: int
    starts: int
    swaps: int
    lost: int

    @property
    def ratio(self) -> float:
        return self.makespan / self.bound

    @property
    def idle(self) -> float:
        return 1 - self.busy_seconds / self.slot_seconds


class Load:
    """Requests on one server: each lease has work for so many seconds of the server alone, and they slow each other."""

    def __init__(self, clock: simpy.Environment, batching: float) -> None:
        self.busy = 0.0
        self._clock, self._batching = clock, batching
        self._left: dict[int, float] = {}
        self._over: dict[int, simpy.Event] = {}
        self._since, self._version = 0.0, 0

    def add(self, lease: int, seconds: float) -> simpy.Event:
        """Comes with what is left: 0, or more if the lease was dropped before."""
        self._advance()
        self._left[lease], self._over[lease] = seconds, self._clock.event()
        self._plan()
        return self._over[lease]

    def drop(self, lease: int) -> None:
        self._advance()
        if lease in self._left:
            self._end(lease)
            self._plan()

    def _end(self, lease: int) -> None:
        self._over.pop(lease).succeed(max(0.0, self._left.pop(lease)))

    def _rate(self) -> float:
        return min(1.0, self._batching / max(1, len(self._left)))

    def _advance(self) -> None:
        elapsed = self._clock.now - self._since
        if self._left:
            self.busy += elapsed
            done = elapsed * self._rate()
            self._left = {lease: left - done for lease, left in self._left.items()}
        self._since = self._clock.now

    def _plan(self) -> None:
        self._version += 1
        if self._left:
            version, seconds = self._version, max(0.0, min(self._left.values()) / self._rate())
            after(self._clock, seconds, lambda: self._due(version))

    def _due(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        for lease in [lease for lease, left in self._left.items() if left <= 1e-6]:
            self._left[lease] = 0.0
            self._end(lease)
        self._plan()


def after(clock: simpy.Environment, seconds: float, happens: Callable[[], None]) -> None:
    """Have something happen later."""
    clock.timeout(seconds).callbacks.append(lambda _: happens())


@dataclass
class Slot:
    """A slot that is held.

    Attributes:
        load: The requests on its server.
        since: When it was asked for.
        lost: Comes if it is preempted.
        base: Of the model that is up in it.
        trained: Seconds of training so far.
        training_since: When the training under way began.
        copies: When its node has which fine-tune.
    """

    load: Load
    since: float
    lost: simpy.Event
    base: str | None = None
    trained: float = 0.0
    training_since: float = 0.0
    copies: dict[str, float] = field(default_factory=dict)


class Simulation:
    """One sweep.

    Args:
        strategies: The strategies; an optimizer whose key begins with `w` fine-tunes.
        slots: Slots at most.
        times: What takes how long.
        switches: How it is run.
        seed: Of what is drawn.
    """

    def __init__(self, strategies: Sequence[str], slots: int, times: Times, switches: Switches, seed: int = 0) -> None:
        self.strategies, self.times, self.switches, self.seed = strategies, times, switches, seed
        self.slots = slots
        self.clock = simpy.Environment()
        self.placement = Placement({"": switches.policy(slots)}, {"": BASE} if switches.starts_ahead else None)
        self.claims = ClaimTable(set(), 0)
        self.trainings = {step for step in all_prefixes(strategies) if trains(step)}
        self.urgency = steps_to_come([BASELINE, *all_prefixes(strategies)])
        self.weights: dict[str, Weights] = {}
        self.held: dict[int, Slot] = {}
        self.counted: Counter[str] = Counter()
        self.slot_seconds = self.busy_seconds = 0.0
        self._leases = itertools.count(1)
        self._granted: dict[int, simpy.Event] = {}
        self._committed = {step: self.clock.event() for step in [BASELINE, *all_prefixes(strategies)]}
        self._chance = random.Random(f"{seed}/what happens")
        self._waiting: list[str] = []
        self._running = 0
        self._ticking = False

    def drawn(self, what: str, of: object) -> float:
        """A time, the same whenever this simulation, or another of its seed, asks for it."""
        median: float = getattr(self.times, what)
        return median * math.exp(random.Random(f"{self.seed}/{what}/{of}").gauss(0, self.times.spread)) if median else 0.0

    def run(self) -> Outcome:
        """Run it to its end."""
        paths = {strategy: [BASELINE, *prefixes(strategy)] for strategy in self.strategies}
        self._waiting = start_order(paths, (), self.trainings) if self.switches.in_start_order else list(self.strategies)
        self._waiting.reverse()
        for _ in range(1 if self.switches.grows else self.slots):
            self.placement.grow(self.clock.now)
        for _ in range(min(len(self._waiting), self.switches.trials_per_slot * self.slots)):
            self._next_trial()
        self._decide()
        while self._running:
            self._step_all()
            self._decide()
        for number in list(self.held):
            self._let_go(number)
        steps = list(self._committed)
        bound = lower_bound({step: self.step_work(step) for step in steps}, self.slots)
        counted = (self.counted[what] for what in ("start", "swap", "lost"))
        return Outcome(self.clock.now, bound, self.slot_seconds, self.busy_seconds, len(steps), *counted)

    def step_work(self, prefix: str) -> tuple[float, float]:
        """Seconds that a step takes alone on a server, and those of a slot that it takes at least."""
        requests = self.drawn("evaluate", prefix) + (self.drawn("prompt", prefix) if not trains(prefix) and prefix else 0.0)
        training = self.drawn("train", prefix) if trains(prefix) else 0.0
        return requests + training, requests / self.switches.batching + training

    def _step_all(self) -> None:
        """What happens next, with all else that happens at the same time."""
        now = self.clock.peek()
        while self.clock.peek() <= now:
            self.clock.step()

    def _next_trial(self) -> None:
        if self._waiting:
            self._running += 1
            self.clock.process(self._trial(self._waiting.pop()))

    def _trial(self, strategy: str) -> Process:
        yield self.clock.timeout(self.drawn("trial", strategy))
        goes_on = False
        for prefix in [BASELINE, *prefixes(strategy)]:
            while (granted := self.claims.try_claim(prefix)) is False:
                yield self._committed[prefix]
                yield self.clock.timeout(self.drawn("news", (strategy, prefix)))
            if granted is True:
                goes_on = False
                continue
            assert isinstance(granted, int)
            yield from self._step(strategy, prefix, goes_on)
            goes_on = True
            self.claims.end(prefix, granted, committed=True)
            self._committed[prefix].succeed()
        self._running -= 1
        self._next_trial()

    def _step(self, holder: str, prefix: str, goes_on: bool) -> Process:
        weights = self.weights[parent(prefix)] if prefix else BASE
        work = self.drawn("evaluate", prefix)
        if trains(prefix):
            on = (weights.on or weights) if self.switches.adapters else None
            made = Weights(f"model-0-ft-{prefix.replace(SEPARATOR, '-')}", prefix, weights.id, on=on)
            yield from self._train(holder, prefix, weights, made, goes_on)
            weights, goes_on = made, True
        elif prefix:
            work += self.drawn("prompt", prefix)
        self.weights[prefix] = weights
        while work > 0:
            lease, goes_on = self._ask(holder, prefix, weights, goes_on, exclusive=False), False
            load = self.held[(yield self._granted[lease])].load
            after(self.clock, self.switches.renew_s, lambda load=load, lease=lease: load.drop(lease))  # type: ignore[misc]
            work = yield load.add(lease, work)
            self.placement.end_lease(lease, self.clock.now)

    def _train(self, holder: str, prefix: str, parent_weights: Weights, made: Weights, goes_on: bool) -> Process:
        left, whole = self.drawn("train", prefix), False
        while not whole:
            lease, goes_on = self._ask(holder, prefix, parent_weights, goes_on, exclusive=True), False
            number = yield self._granted[lease]
            slot, copying = self.held[number], self._fetch(number, parent_weights)
            slot.training_since = self.clock.now + copying
            if not self.switches.stays_up:
                slot.base = None
            yield slot.lost | self.clock.timeout(copying + left)
            whole = not slot.lost.triggered
            trained = max(0.0, self.clock.now - slot.training_since)
            if whole:
                slot.trained += trained
                slot.copies[made.id] = self.clock.now
            left -= trained // self.times.checkpoint * self.times.checkpoint
            self.placement.end_lease(lease, self.clock.now, made if whole else None)

    def _fetch(self, number: int, weights: Weights) -> float:
        """Seconds until a slot's node has these weights, which it fetches unless it does so already."""
        if weights.parent is None:
            return 0.0
        there = self.clock.now + self.drawn("fetch", (number, weights.id))
        return max(0.0, self.held[number].copies.setdefault(weights.id, there) - self.clock.now)

    def _ask(self, holder: str, prefix: str, weights: Weights, goes_on: bool, *, exclusive: bool) -> int:
        lease = next(self._leases)
        self._granted[lease] = self.clock.event()
        urgency = self.urgency[prefix] if self.switches.longest_first else 0
        self.placement.add_ask(Ask(lease, holder, weights, exclusive, self.clock.now, urgency, goes_on))
        return lease

    def _decide(self) -> None:
        for action in self.placement.decide(self.clock.now):
            self._carry_out(action)
        if not self._ticking and (self.placement.waiting or self.switches.grows):
            self._ticking = True
            after(self.clock, TICK_S, self._tick)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grow(number):
                self.held[number] = Slot(Load(self.clock, self.switches.batching), self.clock.now, self.clock.event())
                after(self.clock, self.drawn("grow", number), lambda: self._place(number))
            case Serve(number, weights):
                self._serve(number, weights)
            case Fetch(number, weights):
                there = self._fetch(number, weights) if self.switches.fetches_ahead else 0.0
                whole = self.switches.fetches_ahead
                after(self.clock, there, lambda: self.placement.note_fetched(number, weights, whole=whole))
            case Grant(ask, number):
                self._granted.pop(ask.lease).succeed(number)
            case Revoke(ask, number):
                self.held[number].load.drop(ask.lease)
            case Stop(number):
                self.placement.note_stopped(number, self.clock.now)
            case Release(number):
                self._let_go(number)

    def _serve(self, number: int, weights: Weights) -> None:
        slot = self.held[number]
        how = "swap" if slot.base == weights.base else "start"
        slot.base = weights.base
        self.counted[how] += 1
        seconds = self._fetch(number, weights) + self.drawn(how, (number, self.counted[how]))
        after(self.clock, seconds, lambda: self.placement.note_served(number, self.clock.now))

    def _tick(self) -> None:
        self._ticking = False

    def _place(self, number: int) -> None:
        self.placement.note_placed(number, self.clock.now)
        if self.times.preempted < math.inf:
            after(self.clock, self._chance.expovariate(1 / self.times.preempted), lambda: self._preempt(number))

    def _preempt(self, number: int) -> None:
        if (slot := self.held.get(number)) is None:
            return
        self.counted["lost"] += 1
        for ask in self.placement.note_died(number):
            slot.load.drop(ask.lease)
            slot.trained += max(0.0, self.clock.now - slot.training_since) if ask.exclusive else 0.0
        slot.lost.succeed()
        self._let_go(number)

    def _let_go(self, number: int) -> None:
        slot = self.held.pop(number)
        self.slot_seconds += self.clock.now - slot.since
        self.busy_seconds += slot.load.busy + slot.trained
