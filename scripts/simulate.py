"""Simulate sweeps on clusters that are not at hand, with the decisions that the pool itself takes.

    python scripts/simulate.py --max-length 3 --slots 1 2 4 8          # all strategies of p and w
    python scripts/simulate.py --optimizers p,w,g --max-length 8 --slots 1024 --gpu-hour-price 2.5
    python scripts/simulate.py --like runs/iris --slots 2 8            # with the times that this run measured
    python scripts/simulate.py --compare --slots 8 64 --html scales.html

Discrete events around the real `bt_ray.pool.policy`, `bt_ray.claims` and order of trials. What takes time is drawn, for each
step and each server anew, from log-normal distributions around medians: those of the demo on two CPU cores, unless `--like`
names a run directory to measure, or an option gives one. Beside the makespan stands its ratio to what no schedule can beat
(the largest, over all times t, of t + (the work of steps that cannot start before t) / slots), and what the slots cost.
"""

import argparse
import html
import io
import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from simulation.measured import measured
from simulation.sweep import Outcome, Simulation, Switches, Times

from bt_ray.errors import amount
from bt_ray.strategy import all_prefixes, every

COMPARED: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "trials in the order given": {"in_start_order": False},
    "no step is more urgent": {"longest_first": False},
    "one trial per slot": {"trials_per_slot": 1},
    "four trials per slot": {"trials_per_slot": 4},
    "turns of 10 s": {"turn_s": 10.0},
    "turns of 10 min": {"turn_s": 600.0},
    "leases of 15 s": {"renew_s": 15.0},
    "leases of 10 min": {"renew_s": 600.0},
    "servers stop for a training": {"stays_up": False},
    "servers start when asked for": {"starts_ahead": False},
    "fine-tunes are fetched when used": {"fetches_ahead": False},
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
        shown.add_column(heading, justify="right", no_wrap=True)
    for (name, slots), found in outcomes.items():
        hours = middle(found, "slot_seconds") / 3600
        cells = [f"{slots}", duration(middle(found, "makespan")), duration(middle(found, "bound"))]
        cells += [f"{middle(found, 'ratio'):.3f}", f"{hours:,.1f}", f"{middle(found, 'idle'):.0%}"]
        cells += [f"{middle(found, what):g}" for what in ("starts", "swaps", "lost")]
        shown.add_row(name, *cells, *([f"{hours * price:,.0f}"] if price else []))
    return shown


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.1f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"
    )


def middle(found: Sequence[Outcome], what: str) -> float:
    """The median of a field or a property."""
    return statistics.median(getattr(outcome, what) for outcome in found)


def advice(outcomes: Mapping[tuple[str, int], Sequence[Outcome]]) -> list[str]:
    """What the outcomes say to do, a line for each number of slots and for each way that is worth taking there.

    A way is worth it that makes the sweep 2 % faster than the first way, or that takes 5 % fewer slot hours.
    """
    ways, scales = (list(dict.fromkeys(key[n] for key in outcomes)) for n in (0, 1))
    first, lines = ways[0], []
    for smaller, slots in zip([None, *sorted(scales)], sorted(scales), strict=False):
        here = outcomes[first, slots]
        took, idle = duration(middle(here, "makespan")), middle(here, "idle")
        line = f"{amount(slots, 'slot')}: {took}, {idle:.0%} of the slots' time idle."
        if smaller is not None:
            changes = changed(outcomes[first, smaller], here)
            line += f" {slots / smaller:g} times as many slots as {smaller}: {changes}."
        lines.append(line)
        for way in ways[1:]:
            time_ratio, hours_ratio = ratios(here, outcomes[way, slots])
            if time_ratio <= 0.98 or hours_ratio <= 0.95:
                lines.append(f"{amount(slots, 'slot')}, {way}: {changed(here, outcomes[way, slots])}.")
    return lines


def ratios(before: Sequence[Outcome], after: Sequence[Outcome]) -> tuple[float, float]:
    """By how much the makespan and the slot hours change, as factors."""
    time_ratio, hours_ratio = (middle(after, what) / middle(before, what) for what in ("makespan", "slot_seconds"))
    return time_ratio, hours_ratio


def changed(before: Sequence[Outcome], after: Sequence[Outcome]) -> str:
    time_ratio, hours_ratio = ratios(before, after)
    return f"{time_ratio - 1:+.0%} time, {hours_ratio - 1:+.0%} slot hours"


PLOTTED: dict[str, tuple[str, float]] = {
    "makespan": ("makespan, minutes", 1 / 60),
    "ratio": ("makespan / bound", 1),
    "slot_seconds": ("slot hours", 1 / 3600),
    "idle": ("idle share of the slots", 1),
}
"""What is plotted: its title, and what it is multiplied by."""


def page(outcomes: Mapping[tuple[str, int], Sequence[Outcome]], title: str, price: float | None) -> str:
    """An HTML page that needs nothing else: what the outcomes say to do, plots by slots, and the table."""
    from plotly import graph_objects
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=2, subplot_titles=[heading for heading, _ in PLOTTED.values()])
    colors = itertools.cycle(qualitative.Dark24)
    for name, color in zip(dict.fromkeys(name for name, _ in outcomes), colors, strict=False):
        points = {slots: found for (n, slots), found in outcomes.items() if n == name}
        for number, (what, (_, unit)) in enumerate(PLOTTED.items()):
            y = [middle(found, what) * unit for found in points.values()]
            trace = graph_objects.Scatter(
                x=list(points), y=y, name=name, legendgroup=name, showlegend=number == 0, line_color=color
            )
            figure.add_trace(trace, row=1 + number // 2, col=1 + number % 2)
    figure.update_xaxes(type="log", title="slots")
    figure.update_layout(height=800)
    shown = Console(record=True, width=160, file=io.StringIO())
    shown.print(table(outcomes, price))
    said = "".join(f"<li>{html.escape(line)}</li>" for line in advice(outcomes))
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<body style='font-family: sans-serif; max-width: 75rem; margin: 2rem auto'><h1>{html.escape(title)}</h1>"
        f"<ul>{said}</ul>{figure.to_html(include_plotlyjs=True, full_html=False)}"
        f"<pre>{html.escape(shown.export_text())}</pre>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default="p,w", help="keys; one that begins with w fine-tunes (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=3, help="of the strategies (default: %(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=5, help="sweeps for each line, of which it shows medians")
    parser.add_argument(
        "--like", type=Path, metavar="RUN_DIR", help="take the times from a finished sweep; its swaps include fetching"
    )
    parser.add_argument("--compare", action="store_true", help="compare the ways to run a sweep")
    parser.add_argument("--gpu-hour-price", type=float, help="of a slot; adds the cost")
    parser.add_argument("--html", type=Path, help="write a page with what they say, plots and the table to this file")
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
    for line in advice(outcomes):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Simulated in {time.monotonic() - began:.1f} s.", highlight=False)
    if options.html:
        options.html.write_text(page(outcomes, about, options.gpu_hour_price))


if __name__ == "__main__":
    main()
