"""Progress of a running sweep: a live table in a terminal, plain lines elsewhere."""

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from bt_ray.events import (
    Connected,
    Event,
    ServerChanged,
    ServerReplaced,
    Stage,
    StepFinished,
    TrialEnded,
    TrialLost,
    TrialStarted,
)
from bt_ray.report.state import server_table, trial_table
from bt_ray.report.table import errors_in_words, percent
from bt_ray.run_dir.status_file import OfATrial, SweepState

TRAINING_LINES_S = 30
"""Seconds between two lines about one training, without a live table."""


class Progress:
    """Shows a sweep's events. Use it as a context manager, and give it to the sweep as its listener."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._state = SweepState()
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
            self._state.note(event)
            if line and (self._live is None or isinstance(event, StepFinished | TrialLost | ServerReplaced)):
                self._console.print(f"[{self._clock()}] {line}", highlight=False, markup=False, soft_wrap=True)

    def _is_small_news(self, event: Event) -> bool:
        """Whether `event` is a training's next step, too soon after its last line for another one."""
        if not isinstance(event, ServerChanged):
            return False
        before = self._state.servers.get(event.server)
        goes_on = before is not None and before.state == event.state == "training"
        if goes_on and time.time() - self._told_training[event.server] < TRAINING_LINES_S:
            return True
        self._told_training[event.server] = time.time()
        return False

    def _line(self, event: Event) -> str:
        line = ""
        match event:
            case Stage(text):
                line = text
            case Connected(dashboard):
                line = f"Ray's dashboard: {dashboard}" if dashboard else ""
            case TrialStarted():
                line = f"{_label_event(event)}: started"
            case StepFinished(_, prefix, score, best_score, seconds, loaded, _, errors):
                name = f"step {prefix}" if prefix else "baseline"
                took = "already computed" if loaded else f"in {seconds:.0f} s"
                line = f"{_label_event(event)}: {name} {percent(score)} (best {percent(best_score)}), {took}"
                if errors:
                    line += f"; {errors_in_words(errors)}"
            case TrialLost(_, reason):
                line = f"{_label_event(event)}: lost, and runs again: {reason}"
            case TrialEnded(_, error):
                line = f"{_label_event(event)}: ended early: {error}" if error else ""
            case ServerChanged(server, state, weights_id, holder, detail):
                by = f" for {holder}" if holder else ""
                line = f"server {server}: {state} {weights_id or ''}{by}{', ' + detail if detail else ''}"
            case ServerReplaced(server, reason):
                line = f"server {server}: restarted: {reason}"
        return line

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.time() - self._state.started), 60)
        return f"{minutes:3d}:{seconds:02d}"

    def _render(self) -> RenderableType:
        with self._lock:
            stage = Text(f"[{self._clock()}] {self._state.stage}")
            return Group(stage, trial_table(self._state), "", server_table(self._state))


def _label_event(event: OfATrial) -> str:
    return f'strategy "{event.strategy}"{f" [{event.variant}]" if event.variant else ""}'
