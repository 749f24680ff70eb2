"""Simulate sweeps on clusters that are not at hand, with the decisions that the pool itself takes.

    python scripts/simulate.py --max-length 3 --slots 1 2 4 8          # all strategies of p and w
    python scripts/simulate.py --optimizers p,w,g --max-length 8 --slots 1024 --gpu-hour-price 2.5
    python scripts/simulate.py --like runs/iris --slots 2 8            # with the times that this run measured
    python scripts/simulate.py --compare --slots 8 64 --html scales.html

Discrete events around the real `bt_ray.placement`, `bt_ray.claims` and order of trials. What takes time is drawn, for each
step and each server anew, from log-normal distributions around medians: those of the demo on two CPU cores, unless `--like`
names a run directory to measure, or an option gives one. Beside the makespan stands its ratio to what no schedule can beat
(the largest over t of t + work that cannot start before t / slots, of the steps' times alone), and what the slots cost.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bt_ray.claims import ClaimTable
from bt_ray.placement import Ask, Grant, Grow, Placement, Policy, Release, Revoke, Serve, Stop
from bt_ray.strategy import BASELINE, SEPARATOR, all_prefixes, every, parent, prefixes, start_order
from bt_ray.weights import Weights

TICK_S = 1.0
"""As the pool's: time alone may be a reason to act."""


@dataclass(frozen=True)
class Times:
    """Medians in seconds.

    Attributes:
        start: Of a server, until it answers.
        swap: To other weights in place, verified.
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
        longest_first: Whether trials start as a sweep starts them, or in the order given.
        turn_s: As `server.turn_s`.
        patience_s: As the pool's.
        renew_s: Seconds after which a trial asks for its lease anew, as another server may be free.
        idle_timeout_s: As `server.idle_timeout_s`.
        stays_up: Whether a server keeps its model during a training.
        adapters: Adapters served at once; 0: merged checkpoints.
        grows: Whether slots are asked for one by one, as they are wanted, rather than all at once.
    """

    trials_per_slot: int = 2
    batching: float = 1.0
    longest_first: bool = True
    turn_s: float = 60.0
    patience_s: float = 30.0
    renew_s: float = 60.0
    idle_timeout_s: float = 300.0
    stays_up: bool = True
    adapters: int = 0
    grows: bool = False

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


class Signal:
    """Something that a process waits for."""

    def __init__(self) -> None:
        self._resume: list[Callable[[Any], None]] = []

    def then(self, resume: Callable[[Any], None]) -> None:
        self._resume.append(resume)

    def fire(self, value: Any = None) -> None:
        resumed, self._resume = self._resume, []
        for resume in resumed:
            resume(value)


Process = Generator[Signal, Any, Any]


class Clock:
    """Simulated time, and the processes that run in it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), happens))

    def sleep(self, seconds: float) -> Signal:
        woken = Signal()
        self.at(seconds, woken.fire)
        return woken

    def run(self, process: Process) -> None:
        """Run a process until it waits, and on whenever what it waits for comes."""

        def resume(value: Any) -> None:
            try:
                process.send(value).then(resume)
            except StopIteration:
                return

        resume(None)

    def step(self) -> None:
        """What happens next, with all else that happens at the same time."""
        self.now = self._queue[0][0]
        while self._queue and self._queue[0][0] <= self.now:
            heapq.heappop(self._queue)[2]()


class Load:
    """Requests on one server: each lease has work for so many seconds of the server alone, and they slow each other."""

    def __init__(self, clock: Clock, batching: float) -> None:
        self.busy = 0.0
        self._clock, self._batching = clock, batching
        self._left: dict[int, float] = {}
        self._signals: dict[int, Signal] = {}
        self._since, self._version = 0.0, 0

    def add(self, lease: int, seconds: float) -> Signal:
        """Fires with what is left: 0, or more if the lease was dropped before."""
        self._advance()
        self._left[lease], self._signals[lease] = seconds, Signal()
        self._plan()
        return self._signals[lease]

    def drop(self, lease: int) -> None:
        self._advance()
        if lease in self._left:
            self._end(lease)
            self._plan()

    def _end(self, lease: int) -> None:
        left, signal = self._left.pop(lease), self._signals.pop(lease)
        self._clock.at(0, lambda: signal.fire(max(0.0, left)))

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
            version = self._version
            self._clock.at(max(0.0, min(self._left.values()) / self._rate()), lambda: self._due(version))

    def _due(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        for lease in [lease for lease, left in self._left.items() if left <= 1e-6]:
            self._left[lease] = 0.0
            self._end(lease)
        self._plan()


@dataclass
class Slot:
    """A slot that is held.

    Attributes:
        load: The requests on its server.
        since: When it was asked for.
        base: Of the model that is up in it.
        trained: Seconds of training so far.
        training: What tells of the training's end: whether it came to it.
    """

    load: Load
    since: float
    base: str | None = None
    trained: float = 0.0
    training: Signal | None = None


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
        self.clock = Clock()
        self.placement = Placement({"": switches.policy(slots)})
        self.claims = ClaimTable(set(), 0)
        self.weights: dict[str, Weights] = {}
        self.held: dict[int, Slot] = {}
        self.counted: Counter[str] = Counter()
        self.slot_seconds = self.busy_seconds = 0.0
        self._leases = itertools.count(1)
        self._granted: dict[int, Signal] = {}
        self._committed: dict[str, Signal] = {}
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
        self._waiting = start_order(paths, ()) if self.switches.longest_first else list(self.strategies)
        self._waiting.reverse()
        for _ in range(1 if self.switches.grows else self.slots):
            self.placement.grow(self.clock.now)
        for _ in range(min(len(self._waiting), self.switches.trials_per_slot * self.slots)):
            self._next_trial()
        self._decide()
        while self._running:
            self.clock.step()
            self._decide()
        for number in list(self.held):
            self._let_go(number)
        steps = all_prefixes(self.strategies)
        makespan, bound = (
            self.clock.now,
            lower_bound({step: self.step_work(step) for step in [BASELINE, *steps]}, self.slots),
        )
        counted = (self.counted[what] for what in ("start", "swap", "lost"))
        return Outcome(makespan, bound, self.slot_seconds, self.busy_seconds, len(steps) + 1, *counted)

    def step_work(self, prefix: str) -> tuple[float, float]:
        """Seconds that a step takes alone on a server, and those of a slot that it takes at least."""
        requests = self.drawn("evaluate", prefix) + (self.drawn("prompt", prefix) if not trains(prefix) and prefix else 0.0)
        training = self.drawn("train", prefix) if trains(prefix) else 0.0
        return requests + training, requests / self.switches.batching + training

    def _next_trial(self) -> None:
        if self._waiting:
            self._running += 1
            self.clock.run(self._trial(self._waiting.pop()))

    def _trial(self, strategy: str) -> Process:
        yield self.clock.sleep(self.drawn("trial", strategy))
        for prefix in [BASELINE, *prefixes(strategy)]:
            while (granted := self.claims.try_claim(prefix)) is False:
                yield self._committed.setdefault(prefix, Signal())
            if granted is True:
                continue
            assert isinstance(granted, int)
            yield from self._step(strategy, prefix)
            self.claims.end(prefix, granted, committed=True)
            self._committed.setdefault(prefix, Signal()).fire()
        self._running -= 1
        self._next_trial()

    def _step(self, holder: str, prefix: str) -> Process:
        weights = self.weights[parent(prefix)] if prefix else Weights("model-0", "model")
        work = self.drawn("evaluate", prefix)
        if trains(prefix):
            yield from self._train(holder, weights, prefix)
            on = (weights.on or weights) if self.switches.adapters else None
            weights = Weights(f"model-0-ft-{prefix.replace(SEPARATOR, '-')}", prefix, weights.id, on=on)
        elif prefix:
            work += self.drawn("prompt", prefix)
        self.weights[prefix] = weights
        while work > 0:
            lease = self._ask(holder, weights, exclusive=False)
            number = yield self._granted[lease]
            load = self.held[number].load
            self.clock.at(self.switches.renew_s, lambda load=load, lease=lease: load.drop(lease))  # type: ignore[misc]
            work = yield load.add(lease, work)
            self.placement.ended(lease, self.clock.now)

    def _train(self, holder: str, parent_weights: Weights, prefix: str) -> Process:
        left, whole = self.drawn("train", prefix), False
        while not whole:
            lease = self._ask(holder, parent_weights, exclusive=True)
            number = yield self._granted[lease]
            began, slot = self.clock.now, self.held[number]
            if not self.switches.stays_up:
                slot.base = None
            slot.training = ended = Signal()
            self.clock.at(left, lambda signal=ended: signal.fire(True))  # type: ignore[misc]
            whole = yield ended
            slot.training = None
            slot.trained += self.clock.now - began
            left -= (self.clock.now - began) // self.times.checkpoint * self.times.checkpoint
            self.placement.ended(lease, self.clock.now)

    def _ask(self, holder: str, weights: Weights, *, exclusive: bool) -> int:
        lease = next(self._leases)
        self._granted[lease] = Signal()
        self.placement.asked(Ask(lease, holder, weights, exclusive, self.clock.now))
        return lease

    def _decide(self) -> None:
        for action in self.placement.decide(self.clock.now):
            match action:
                case Grow(number):
                    self.held[number] = Slot(Load(self.clock, self.switches.batching), self.clock.now)
                    self.clock.at(self.drawn("grow", number), lambda n=number: self._place(n))  # type: ignore[misc]
                case Serve(number, weights):
                    slot = self.held[number]
                    how = "swap" if slot.base == weights.base else "start"
                    slot.base = weights.base
                    self.counted[how] += 1
                    seconds = self.drawn(how, (number, self.counted[how]))
                    self.clock.at(seconds, lambda n=number: self.placement.served(n, self.clock.now))  # type: ignore[misc]
                case Grant(ask, number):
                    self.clock.at(0, lambda a=ask, n=number: self._granted.pop(a.lease).fire(n))  # type: ignore[misc]
                case Revoke(ask, number):
                    self.held[number].load.drop(ask.lease)
                case Stop(number):
                    self.placement.stopped(number, self.clock.now)
                case Release(number):
                    self._let_go(number)
        if not self._ticking and (self.placement.waiting or self.switches.grows):
            self._ticking = True
            self.clock.at(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False

    def _place(self, number: int) -> None:
        self.placement.placed(number, self.clock.now)
        if self.times.preempted < math.inf:
            self.clock.at(self._chance.expovariate(1 / self.times.preempted), lambda: self._preempt(number))

    def _preempt(self, number: int) -> None:
        if number not in self.held:
            return
        self.counted["lost"] += 1
        slot = self.held[number]
        for ask in self.placement.died(number):
            if ask.exclusive and slot.training is not None:
                slot.training.fire(False)
            else:
                slot.load.drop(ask.lease)
        self._let_go(number)

    def _let_go(self, number: int) -> None:
        slot = self.held.pop(number)
        self.slot_seconds += self.clock.now - slot.since
        self.busy_seconds += slot.load.busy + slot.trained


def trains(prefix: str) -> bool:
    return prefix.rpartition(SEPARATOR)[2].startswith("w")


def lower_bound(work: Mapping[str, tuple[float, float]], slots: int) -> float:
    """Seconds that no schedule can beat: the longest path, and for each t, t and what cannot start before it.

    Args:
        work: Of each step, the seconds that it takes alone, and those of a slot that it takes at least.
        slots: Slots.
    """
    begins: dict[str, float] = {}
    longest = 0.0
    for step in sorted(work, key=lambda step: len(step.split(SEPARATOR)) if step else 0):
        begins[step] = begins[parent(step)] + work[parent(step)][0] if step else 0.0
        longest = max(longest, begins[step] + work[step][0])
    later = 0.0
    for step in sorted(work, key=begins.__getitem__, reverse=True):
        later += work[step][1]
        longest = max(longest, begins[step] + later / slots)
    return longest


def measured(run_dir: Path) -> Times:
    """The times that a finished sweep took."""
    from bt_ray.report.steps import read_steps
    from bt_ray.storage import open_storage

    storage = open_storage(str(run_dir.resolve()))
    _, steps = read_steps(storage)
    events = [json.loads(line) for line in (storage.read("events.jsonl") or b"").splitlines()]
    began: dict[int, float] = {}
    seconds: dict[str, list[float]] = {"start": [], "swap": [], "train": [], "prompt": [], "evaluate": []}
    for event in events:
        state = event.get("state", "")
        if state in ("serving, start", "serving, swap"):
            seconds[state.removeprefix("serving, ")].append(event["seconds"])
        elif event.get("exclusive") and state == "granted":
            began[event["lease"]] = event["at"]
        elif state == "ended" and event["lease"] in began:
            seconds["train"].append(event["at"] - began[event["lease"]])
    evaluated = next((step.seconds for step in steps.values() if not step.prefix), Times.evaluate)
    seconds["evaluate"].append(evaluated)
    for step in steps.values():
        if step.prefix and not trains(step.prefix):
            seconds["prompt"].append(max(0.0, step.seconds - evaluated))
    found = {what: statistics.median(values) for what, values in seconds.items() if values}
    return replace(Times(), **found)


COMPARED: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "trials in the order given": {"longest_first": False},
    "one trial per slot": {"trials_per_slot": 1},
    "four trials per slot": {"trials_per_slot": 4},
    "turns of 10 s": {"turn_s": 10.0},
    "turns of 10 min": {"turn_s": 600.0},
    "leases of 15 s": {"renew_s": 15.0},
    "leases of 10 min": {"renew_s": 600.0},
    "servers stop for a training": {"stays_up": False},
    "4 adapters at once": {"adapters": 4},
    "servers batch 4 evaluations": {"batching": 4.0},
    "slots as they are wanted": {"grows": True},
}


def simulated(
    strategies: Sequence[str], slots: Iterable[int], times: Times, switches: Mapping[str, Switches], seeds: int
) -> dict[tuple[str, int], list[Outcome]]:
    """The outcomes of each way to run the sweep, on each number of slots, of several seeds."""
    return {
        (name, count): [Simulation(strategies, count, times, switch, seed).run() for seed in range(seeds)]
        for count in slots
        for name, switch in switches.items()
    }


def table(outcomes: Mapping[tuple[str, int], Sequence[Outcome]], price: float | None) -> Table:
    """The medians, a line for each way to run the sweep."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("", no_wrap=True)
    headings = ["slots", "makespan", "bound", "ratio", "slot hours", "idle", "starts", "swaps", "lost"]
    for heading in [*headings, *(["cost"] if price else [])]:
        shown.add_column(heading, justify="right")
    for (name, slots), found in outcomes.items():
        middle = {f.name: statistics.median(getattr(o, f.name) for o in found) for f in fields(Outcome)}
        ratio, idle = (statistics.median(getattr(o, what) for o in found) for what in ("ratio", "idle"))
        hours = middle["slot_seconds"] / 3600
        cells = [f"{slots}", duration(middle["makespan"]), duration(middle["bound"]), f"{ratio:.3f}", f"{hours:,.1f}"]
        cells += [f"{idle:.0%}", *(f"{middle[what]:g}" for what in ("starts", "swaps", "lost"))]
        shown.add_row(name, *cells, *([f"{hours * price:,.0f}"] if price else []))
    return shown


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.1f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"
    )


def page(outcomes: Mapping[tuple[str, int], Sequence[Outcome]], title: str) -> str:
    """The ratios and the idle shares by slots, as an HTML page."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, subplot_titles=("makespan / bound", "idle share of the slots"))
    for name in dict.fromkeys(name for name, _ in outcomes):
        points = {slots: found for (n, slots), found in outcomes.items() if n == name}
        for column, what in enumerate(("ratio", "idle"), start=1):
            y = [statistics.median(getattr(outcome, what) for outcome in found) for found in points.values()]
            trace = graph_objects.Scatter(x=list(points), y=y, name=name, legendgroup=name, showlegend=column == 1)
            figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(type="log", title="slots")
    figure.update_layout(title=title)
    html: str = figure.to_html(include_plotlyjs=True)
    return html


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default="p,w", help="keys; one that begins with w fine-tunes (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=3, help="of the strategies (default: %(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=5, help="sweeps for each line, of which it shows medians")
    parser.add_argument("--like", type=Path, metavar="RUN_DIR", help="take the times from a finished sweep")
    parser.add_argument("--compare", action="store_true", help="compare the ways to run a sweep")
    parser.add_argument("--gpu-hour-price", type=float, help="of a slot; adds the cost")
    parser.add_argument("--html", type=Path, help="write the plots to this file")
    for each in fields(Times):
        parser.add_argument(f"--{each.name}", type=float, metavar="SECONDS", help=f"default: {each.default}")
    for each in fields(Switches):
        kind = each.default.__class__
        given = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{each.name.replace('_', '-')}", default=None, help=f"default: {each.default}", **given)
    options = parser.parse_args()

    def chosen(kind: type) -> dict[str, Any]:
        return {f.name: value for f in fields(kind) if (value := getattr(options, f.name)) is not None}

    times = replace(measured(options.like) if options.like else Times(), **chosen(Times))
    switches = replace(Switches(), **chosen(Switches))
    compared = (
        {name: replace(switches, **changed) for name, changed in COMPARED.items()} if options.compare else {"": switches}
    )
    strategies = every(options.optimizers.split(","), options.max_length)
    console = Console()
    about = f"{len(strategies)} strategies, {len(all_prefixes(strategies)) + 1} steps"
    console.print(
        f"{about}; medians in seconds: {', '.join(f'{k} {v:g}' for k, v in asdict(times).items())}", highlight=False
    )
    began = time.monotonic()
    outcomes = simulated(strategies, options.slots, times, compared, options.seeds)
    console.print(table(outcomes, options.gpu_hour_price))
    console.print(f"Simulated in {time.monotonic() - began:.1f} s.", highlight=False)
    if options.html:
        options.html.write_text(page(outcomes, about))


if __name__ == "__main__":
    main()
