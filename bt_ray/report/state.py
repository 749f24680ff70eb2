"""What a sweep is doing, as tables and in words: live in its terminal, and for whoever asks its run directory."""

import time
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from bt_ray.report.table import percent, trial_label
from bt_ray.run_dir.status_file import WORD_S, SweepState, TrialState

SILENT = 4 * WORD_S
"""Seconds without a word after which a sweep is taken for dead."""


def trial_table(state: SweepState, now: float | None = None) -> Table:
    """The trials: their scores so far, what they do, and for how long."""
    now = time.time() if now is None else now
    table = Table(box=None, pad_edge=False)
    for column in ("strategy", "scores so far", "now", "for"):
        table.add_column(column)
    for trial in state.trials:
        scores = ", ".join(percent(score) for score in trial.scores)
        lasted = f"{now - trial.since:.0f} s" if trial.state == "running" and trial.step is not None else ""
        table.add_row(*map(Text, (trial_label(trial.strategy, trial.variant), scores, _describe_activity(trial), lasted)))
    return table


def _describe_activity(trial: TrialState) -> str:
    match trial.state:
        case "running":
            return "finishing" if trial.step is None else f"step {trial.step or 'baseline'}"
        case "lost":
            return "lost, runs again"
        case "ended":
            return f"ended early: {trial.error}" if trial.error else "done"
    return trial.state


def server_table(state: SweepState) -> Table:
    """The model servers: what they do, for whom, and how far they are."""
    table = Table(box=None, pad_edge=False)
    for column in ("server", "state", "weights", "held by", "progress"):
        table.add_column(column)
    for number, seen in sorted(state.servers.items()):
        table.add_row(*map(Text, (str(number), seen.state, seen.weights_id or "", seen.holder or "", seen.detail)))
    return table


def headline(state: SweepState, now: float) -> str:
    """Whether the sweep runs, and since when."""
    if state.ended is not None:
        return f"ended {_format_ago(now - state.ended)}, after {_format_duration(state.ended - state.started)}"
    silence = now - state.at
    if silence > SILENT:
        return f"no word {_format_ago(silence)}: the sweep is gone, and the same command goes on where it stopped"
    return f"running for {_format_duration(now - state.started)}: {state.stage}"


def step_lines(done: int, of: int, new: int, seconds: float, left: float | None, unknown: int) -> list[str]:
    """How many steps are finished, how fast, and what is left.

    Args:
        done: Steps that are finished.
        of: All steps.
        new: Those that this run computed.
        seconds: That it has run.
        left: Seconds that the others take, as far as finished ones tell; None if nothing tells.
        unknown: How many steps nothing tells of.
    """
    lines = [f"{done} of {of} steps are finished, the baseline included"]
    if new and seconds:
        lines[0] += f"; {new} in this run, {3600 * new / seconds:.1f} an hour"
    if done < of and left is not None:
        more = f", and {unknown} steps that no finished one is like" if unknown else ""
        lines.append(f"left: about {_format_duration(left)}{more}")
    return lines


def describe_waits(waiting: Mapping[str, float], state: SweepState) -> list[str]:
    """Which trials wait for a server, for how long (seconds), and why none is there."""
    placing = [server.detail for server in state.servers.values() if server.state == "placing" and server.detail]
    why = f"; a server waits for room: {placing[0]}" if placing else "; all servers are busy"
    return [f"{holder} waits for a server, for {seconds:.0f} s{why}" for holder, seconds in waiting.items()]


def _format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _format_ago(seconds: float) -> str:
    return f"{_format_duration(seconds)} ago" if seconds >= 1 else "now"
