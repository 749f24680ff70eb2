"""The simulator and the bounds of the benchmarks: what can be worked out by hand."""

import html
import itertools
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "scripts"))
from simulate import advice, page, simulated
from simulation.measured import alone_seconds, busy_seconds, held_leases
from simulation.schedules import best_makespan, lower_bound
from simulation.sweep import Simulation, Switches, Times

from bt_ray.run_dir.step_store import FinishedStep
from bt_ray.strategy import BASELINE, all_prefixes, every, parent

EXACT = Times(start=10, swap=1, train=100, prompt=50, evaluate=20, trial=3, spread=0)
ALL = every("pw", 3)


def test_one_strategy_takes_what_its_parts_take() -> None:
    outcome = Simulation(["p -> w"], 1, EXACT, Switches()).run()
    assert outcome.makespan == pytest.approx(10 + 20 + (50 + 20) + (100 + 1 + 20), abs=1), "it starts at once"
    assert (outcome.starts, outcome.swaps, outcome.steps) == (1, 1, 3)
    assert outcome.bound == 20 + 70 + 120
    late = Simulation(["p -> w"], 1, EXACT, Switches(starts_ahead=False)).run()
    assert late.makespan == pytest.approx(outcome.makespan + 3, abs=1)
    stopped = Simulation(["p -> w"], 1, EXACT, Switches(stays_up=False)).run()
    assert (stopped.starts, stopped.swaps) == (2, 0)
    assert stopped.makespan == pytest.approx(outcome.makespan + 9, abs=1)


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_each_step_is_computed_once_and_nothing_beats_the_bound(slots: int) -> None:
    outcome = Simulation(ALL, slots, replace(EXACT, spread=0.3), Switches(), seed=slots).run()
    work = {
        step: Simulation(ALL, slots, replace(EXACT, spread=0.3), Switches(), slots).step_work(step) for step in all_steps()
    }
    assert outcome.busy_seconds == pytest.approx(sum(of for _, of in work.values()))
    assert outcome.makespan > outcome.bound
    assert outcome.slot_seconds == pytest.approx(slots * outcome.makespan)


def test_slots_that_are_lost_cost_what_was_under_way_and_nothing_else() -> None:
    times = replace(EXACT, train=1000, checkpoint=200, preempted=500, grow=30)
    lost, kept = (Simulation(ALL, 4, each, Switches()).run() for each in (times, replace(times, preempted=math.inf)))
    assert lost.lost > 3
    assert kept.lost == 0
    assert kept.makespan < lost.makespan
    assert lost.busy_seconds - kept.busy_seconds <= lost.lost * 200, "at most the time since the last checkpoint"


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_trainings_that_take_longer_than_evaluations_make_the_best_schedule(slots: int) -> None:
    times = Times(start=0, swap=0, news=0, trial=0, spread=0, evaluate=20, train=30, prompt=0)
    best = best_makespan({step: 50 if step.endswith("w") else 20 for step in all_steps()}, slots)
    assert Simulation(ALL, slots, times, Switches()).run().makespan == pytest.approx(best)


def test_fetching_costs_nothing_on_the_node_that_trained_and_less_when_it_is_done_ahead() -> None:
    alone = [Simulation(["w -> p"], 1, replace(EXACT, fetch=fetch), Switches()).run().makespan for fetch in (0, 50)]
    assert alone[0] == alone[1]

    def makespans(fetches_ahead: bool) -> float:
        of_seeds = ((replace(EXACT, fetch=30, spread=0.2), seed) for seed in range(10))
        return sum(
            Simulation(ALL, 3, times, Switches(fetches_ahead=fetches_ahead), seed).run().makespan for times, seed in of_seeds
        )

    assert makespans(True) < makespans(False)


def test_a_step_took_its_part_of_the_servers_that_it_had_leases_on_and_no_wait() -> None:
    def granted(at: float, lease: int, strategy: str, exclusive: bool = False) -> dict[str, Any]:
        return {
            "at": at,
            "lease": lease,
            "state": "granted",
            "holder": f"trial {strategy}",
            "exclusive": exclusive,
            "server": 0,
        }

    events: list[dict[str, Any]] = [
        {"at": 10, "lease": 1, "state": "asked", "holder": "trial p -> w", "exclusive": False},
        granted(20, 1, "p -> w"),
        granted(30, 2, "w, process 2"),
        {"at": 50, "lease": 2, "state": "revoked", "holder": "trial w", "exclusive": False, "server": 0},
        {"at": 60, "lease": 2, "state": "ended"},
        {"at": 60, "lease": 1, "state": "ended"},
        granted(65, 3, "p -> w", exclusive=True),
        {"at": 70, "lease": None, "state": "holder died", "holder": "trial p -> w"},
    ]
    held = held_leases(events)
    assert [(lease.began, lease.ended, lease.exclusive) for lease in held] == [
        (30, 50, False),
        (20, 60, False),
        (65, 70, True),
    ]
    assert busy_seconds(held) == 40 + 5

    def alone(prefix: str, started: float, seconds: float) -> float:
        return alone_seconds(FinishedStep("", "", prefix, None, (), started, seconds, {}, "", 0, {}), held)

    assert alone("p", 5, 57) == 10 + 20 / 2 + 10, "it waited until 20, and was not alone from 30 to 50"
    assert alone("w", 25, 35) == 20 / 2
    assert alone("p", 45, 20) == 5 / 2 + 10
    assert alone("p -> p", 5, 57) == 0


def test_slots_that_are_asked_for_as_they_are_wanted_idle_less() -> None:
    grown, held = (Simulation(ALL, 8, EXACT, Switches(grows=grows, idle_timeout_s=20)).run() for grows in (True, False))
    assert grown.slot_seconds < held.slot_seconds


def test_the_page_says_what_is_worth_its_slots_at_each_scale() -> None:
    ways = {"as shipped": Switches(), "grows": Switches(grows=True, idle_timeout_s=20), "slow": Switches(stays_up=False)}
    outcomes = simulated(ALL, [4, 8], EXACT, ways, seeds=1)
    said = advice(outcomes)
    assert [line.partition(":")[0] for line in said] == ["4 slots", "4 slots, grows", "8 slots", "8 slots, grows"]
    hours = {key: found[0].slot_seconds for key, found in outcomes.items()}
    saved = hours["grows", 8] / hours["as shipped", 8] - 1
    assert f"{saved:+.0%} slot hours" in said[-1]
    shown = page(outcomes, "p & w", price=2.5)
    assert "<h1>p &amp; w</h1>" in shown
    assert all(f"<li>{html.escape(line)}</li>" in shown for line in said)
    assert "idle share of the slots" in shown
    assert "cost" in shown


def all_steps() -> list[str]:
    return [BASELINE, *all_prefixes(ALL)]


STEPS = [BASELINE, *all_prefixes(every("pw", 2))]


@given(st.lists(st.integers(1, 9), min_size=len(STEPS), max_size=len(STEPS)), st.integers(1, 3))
@hypothesis_settings(max_examples=50)
def test_the_best_schedule_is_the_best_of_all_orders(times: list[int], slots: int) -> None:
    seconds = dict(zip(STEPS, map(float, times), strict=True))
    orders = [o for o in itertools.permutations(STEPS[1:]) if all(o.index(parent(s)) < o.index(s) for s in o if parent(s))]
    best = min(listed(seconds, (BASELINE, *order), slots) for order in orders)
    assert best_makespan(seconds, slots) == pytest.approx(best)
    assert lower_bound({step: (took, took) for step, took in seconds.items()}, slots) <= best + 1e-9


def listed(seconds: dict[str, float], order: tuple[str, ...], slots: int) -> float:
    """The makespan where each step in turn takes the slot that is free first, and waits there for its parent's end."""
    ends: dict[str, float] = {}
    free = [0.0] * slots
    for step in order:
        begins = max(min(free), ends[parent(step)] if step else 0.0)
        free[free.index(min(free))] = ends[step] = begins + seconds[step]
    return max(ends.values())


@pytest.mark.parametrize(
    "seconds",
    [
        {"": 1, "a": 1, "b": 1, "c": 1, "a -> p": 4, "b -> p": 6, "c -> p": 10, "c -> q": 10},
        {"": 1, "a": 1, "x": 4, "y": 6, "a -> p": 10, "a -> q": 10},
    ],
    ids=["steps that end together", "a slot that waits on purpose"],
)
def test_the_best_schedule_of_trees_that_are_no_easy_ones(seconds: dict[str, float]) -> None:
    assert best_makespan(seconds, 3) == 12
