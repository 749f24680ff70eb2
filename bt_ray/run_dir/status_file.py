"""What a sweep is doing, folded from its events: what its terminal shows, and what `status.json` keeps for others."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from bt_ray.errors import StorageError
from bt_ray.events import (
    Connected,
    Event,
    ServerChanged,
    Stage,
    StepFinished,
    TrialEnded,
    TrialLost,
    TrialStarted,
    TrialWaits,
)
from bt_ray.layout import STATUS
from bt_ray.run_dir.storage import Storage
from bt_ray.strategy import BASELINE, prefixes

SCHEMA_VERSION = 1
DISK_S, OBJECT_S = 2.0, 15.0
"""Seconds between two writes of a status that changed, to a filesystem and to an object store."""
WORD_S = 30.0
"""Seconds after which a status is written that did not change: it says that the sweep is alive."""
OfATrial = TrialWaits | TrialStarted | StepFinished | TrialLost | TrialEnded


@dataclass
class TrialState:
    """What a trial is doing.

    Attributes:
        strategy: Its strategy.
        variant: Its settings of the space.
        state: `"waiting"`, `"running"`, `"lost"` (it runs again), `"ended"`.
        step: The step that it is at, while it runs; None at its end.
        since: Unix time in seconds at which it came there.
        scores: Of its steps so far, in percent; None without validation.
        error: Why it ended early.
    """

    strategy: str
    variant: str = ""
    state: str = "waiting"
    step: str | None = None
    since: float = 0.0
    scores: list[float | None] = field(default_factory=list)
    error: str = ""

    def enter(self, state: str, step: str | None = None) -> None:
        self.state, self.step, self.since = state, step, time.time()


@dataclass
class SweepState:
    """What a sweep is doing.

    Attributes:
        started: Unix time in seconds.
        at: When something was heard of it last.
        ended: When it ended, None while it runs.
        stage: What the driver turned to last.
        trials: In the order of their first event.
        servers: The model servers, by number.
        dashboard: The address of the Ray dashboard, if there is one.
    """

    started: float = field(default_factory=time.time)
    at: float = field(default_factory=time.time)
    ended: float | None = None
    stage: str = ""
    trials: list[TrialState] = field(default_factory=list)
    servers: dict[int, ServerChanged] = field(default_factory=dict)
    dashboard: str = ""

    def note(self, event: Event) -> None:
        match event:
            case Stage(text):
                self.stage = text
            case Connected(dashboard):
                self.dashboard = dashboard
            case TrialWaits():
                self.trial(event)
            case TrialStarted():
                self.trial(event).scores = []
                self.trial(event).enter("running", BASELINE)
            case StepFinished(strategy, prefix, score):
                steps = [BASELINE, *prefixes(strategy)]
                after = steps.index(prefix) + 1
                self.trial(event).scores.append(score)
                self.trial(event).enter("running", steps[after] if after < len(steps) else None)
            case TrialLost():
                self.trial(event).enter("lost")
            case TrialEnded(_, error):
                self.trial(event).enter("ended")
                self.trial(event).error = error or ""
            case ServerChanged(server):
                self.servers[server] = event
                if event.state == "gone":
                    del self.servers[server]

    def trial(self, event: OfATrial) -> TrialState:
        """The trial that an event is of."""
        for trial in self.trials:
            if (trial.strategy, trial.variant) == (event.strategy, event.variant):
                return trial
        self.trials.append(TrialState(event.strategy, event.variant))
        return self.trials[-1]

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "servers": [asdict(s) for s in self.servers.values()]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        given = {name: value for name, value in values.items() if name != "schema_version"}
        servers = {server["server"]: ServerChanged(**server) for server in values["servers"]}
        return cls(**{**given, "trials": [TrialState(**trial) for trial in values["trials"]], "servers": servers})


class StatusFile:
    """Keeps what a sweep is doing in its run directory. What cannot be written costs no result."""

    def __init__(self, storage: Storage) -> None:
        self.state = SweepState()
        self._storage = storage
        self._lock = threading.Lock()
        self._changed = True
        self._ended = threading.Event()

    def note(self, event: Event) -> None:
        with self._lock:
            self.state.note(event)
            self._changed = True

    @contextmanager
    def kept(self) -> Iterator[Self]:
        """Write it now and then, and once more at the end."""
        writer = threading.Thread(target=self._run, name="write-status", daemon=True)
        self._write()
        writer.start()
        try:
            yield self
        finally:
            self._ended.set()
            writer.join(timeout=30)
            self.state.ended = time.time()
            self._write()

    def _run(self) -> None:
        every_s, written = DISK_S if self._storage.folder is not None else OBJECT_S, time.monotonic()
        while not self._ended.wait(every_s):
            if self._changed or time.monotonic() - written > WORD_S:
                self._write()
                written = time.monotonic()

    def _write(self) -> None:
        with self._lock:
            self._changed, self.state.at = False, time.time()
            values = self.state.to_json()
        with contextlib.suppress(OSError, StorageError):
            self._storage.write_json(STATUS, values)
