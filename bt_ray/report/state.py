"""What a sweep is doing, as tables and in words, for its own terminal and for `bt-ray status`."""

import time
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from bt_ray.report.table import percent, trial_label
from bt_ray.run_dir.status_file import WORD_S, SweepState, TrialState

SILENT = 4 * WORD_S
"""Seconds without an update after which a sweep counts as dead."""


def trial_table(state: SweepState, now: float | None = None) -> Table:
    """The trials, with their scores so far, what each does now, and for how long."""
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
    """The model servers, with what each does, for which trial, and its progress."""
    table = Table(box=None, pad_edge=False)
    for column in ("server", "state", "weights", "held by", "progress"):
        table.add_column(column)
    for number, seen in sorted(state.servers.items()):
        table.add_row(*map(Text, (str(number), seen.state, seen.weights_id or "", seen.holder or "", seen.detail)))
    return table


def headline(state: SweepState, now: float) -> str:
    """One line: whether the sweep runs, and for how long."""
    if state.ended is not None:
        return f"ended {_format_ago(now - state.ended)}, after {_format_duration(state.ended - state.started)}"
    silence = now - state.at
    if silence > SILENT:
        died = "the sweep has probably died. Run the same command to resume."
        return f"No update for {_format_duration(silence)}: {died}"
    return f"running for {_format_duration(now - state.started)}: {state.stage}"


def step_lines(done: int, of: int, new: int, seconds: float, left: float | None, unknown: int) -> list[str]:
    """How many steps are finished, at what rate, and how long the others take.

    Args:
        done: Number of finished steps.
        of: Number of all steps.
        new: Number of steps that this run computed.
        seconds: Time that it has run.
        left: Seconds that the other steps take, estimated from finished ones; None without an estimate.
        unknown: Number of steps without an estimate.
    """
    lines = [f"{done} of {of} steps are finished, the baseline included"]
    if new and seconds:
        lines[0] += f"; {new} in this run, {3600 * new / seconds:.1f} an hour"
    if done < of and left is not None:
        more = f", plus {unknown} steps without an estimate" if unknown else ""
        lines.append(f"left: about {_format_duration(left)}{more}")
    return lines


def describe_waits(waiting: Mapping[str, float], state: SweepState) -> list[str]:
    """One line for each trial that waits for a server: for how long (`waiting`, in seconds), and why."""
    placing = [server.detail for server in state.servers.values() if server.state == "placing" and server.detail]
    why = f"a new one waits for room: {placing[0]}" if placing else "all servers are busy"
    return [f"{holder} has waited {seconds:.0f} s for a server: {why}" for holder, seconds in waiting.items()]


def _format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _format_ago(seconds: float) -> str:
    return f"{_format_duration(seconds)} ago" if seconds >= 1 else "now"
