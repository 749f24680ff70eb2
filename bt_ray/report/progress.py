"""Progress while a sweep runs: a live table in a terminal, plain lines elsewhere."""

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bt_ray.events import (
    Event,
    ServerChanged,
    ServerReplaced,
    Stage,
    StepFinished,
    TrialEnded,
    TrialLost,
    TrialStarted,
    TrialWaits,
)
from bt_ray.report.table import errors_in_words, percent, trial_label
from bt_ray.strategy import prefixes

_OfATrial = TrialWaits | TrialStarted | StepFinished | TrialLost | TrialEnded
TRAINING_LINES_S = 30
"""Seconds between two lines about one training, where there is no live table."""


@dataclass
class _Row:
    strategy: str
    state: str = "waiting"
    step_started: float = 0.0
    scores: list[str] = field(default_factory=list)

    def running(self, prefix: str | None) -> None:
        self.state = "finishing" if prefix is None else f"step {prefix or 'baseline'}"
        self.step_started = time.time()


class Progress:
    """Shows a sweep's events. Use it as a context manager, and give it to the sweep as its listener."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._started = time.time()
        self._stage = ""
        self._rows: dict[str, _Row] = {}
        self._servers: dict[int, ServerChanged] = {}
        self._told_training: dict[int, float] = {}
        live = console.is_terminal
        self._live = (
            Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True) if live else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            line = "" if self._is_small_news(event) else self._line(event)
            self._note(event)
            if line and (self._live is None or isinstance(event, StepFinished | TrialLost | ServerReplaced)):
                self._console.print(f"[{self._clock()}] {line}", highlight=False, markup=False, soft_wrap=True)

    def _note(self, event: Event) -> None:
        match event:
            case Stage(text):
                self._stage = text
            case TrialWaits():
                self._row(event)
            case TrialStarted():
                self._row(event).scores = []
                self._row(event).running("")
            case StepFinished(strategy, prefix, score):
                steps = prefixes(strategy)
                position = steps.index(prefix) + 1 if prefix else 0
                self._row(event).scores.append(percent(score))
                self._row(event).running(steps[position] if position < len(steps) else None)
            case TrialLost():
                self._row(event).state = "lost, runs again"
            case TrialEnded(_, error):
                self._row(event).state = f"ended early: {error}" if error else "done"
            case ServerChanged(server, "gone"):
                self._servers.pop(server, None)
            case ServerChanged(server):
                self._servers[server] = event
            case ServerReplaced():
                pass

    def _row(self, event: _OfATrial) -> _Row:
        name = trial_label(event.strategy, event.variant)
        return self._rows.setdefault(name, _Row(name))

    def _is_small_news(self, event: Event) -> bool:
        """Whether `event` is only a training's next step, too soon after the last one told to be a line of its own."""
        if not isinstance(event, ServerChanged):
            return False
        before = self._servers.get(event.server)
        goes_on = before is not None and before.state == event.state == "training"
        if goes_on and time.time() - self._told_training[event.server] < TRAINING_LINES_S:
            return True
        self._told_training[event.server] = time.time()
        return False

    def _line(self, event: Event) -> str:
        match event:
            case Stage(text):
                line = text
            case TrialWaits():
                line = ""
            case TrialStarted():
                line = f"{_named(event)}: started"
            case StepFinished(_, prefix, score, best_score, seconds, loaded, _, errors):
                name = f"step {prefix}" if prefix else "baseline"
                took = "computed already" if loaded else f"in {seconds:.0f} s"
                line = f"{_named(event)}: {name} {percent(score)} (best {percent(best_score)}), {took}"
                if errors:
                    line += f"; {errors_in_words(errors)}"
            case TrialLost(_, reason):
                line = f"{_named(event)}: lost, and run again: {reason}"
            case TrialEnded(_, error):
                line = f"{_named(event)}: ended early: {error}" if error else ""
            case ServerChanged(server, state, weights_id, holder, detail):
                by = f" for {holder}" if holder else ""
                line = f"server {server}: {state} {weights_id or ''}{by}{', ' + detail if detail else ''}"
            case ServerReplaced(server, reason):
                line = f"server {server}: started anew: {reason}"
        return line

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.time() - self._started), 60)
        return f"{minutes:3d}:{seconds:02d}"

    def _render(self) -> RenderableType:
        with self._lock:
            trials = Table(box=None, pad_edge=False)
            for column in ("strategy", "scores so far", "now", "for"):
                trials.add_column(column)
            for row in self._rows.values():
                running = row.state.startswith("step")
                lasted = f"{time.time() - row.step_started:.0f} s" if running else ""
                trials.add_row(*map(Text, (row.strategy, ", ".join(row.scores), row.state, lasted)))
            servers = Table(box=None, pad_edge=False)
            for column in ("server", "state", "weights", "held by", "progress"):
                servers.add_column(column)
            for index, seen in sorted(self._servers.items()):
                servers.add_row(*map(Text, (str(index), seen.state, seen.weights_id or "", seen.holder or "", seen.detail)))
            return Group(Text(f"[{self._clock()}] {self._stage}"), trials, "", servers)


def _named(event: _OfATrial) -> str:
    return f'strategy "{event.strategy}"{f" [{event.variant}]" if event.variant else ""}'
