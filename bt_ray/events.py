"""What happens during a sweep, as frozen records. Progress shows some of them, and `events.jsonl` keeps the others."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """The driver turned to something new: connecting, placing servers, the test at the end."""

    text: str


@dataclass(frozen=True)
class Connected:
    """The driver is connected to a Ray cluster, whose dashboard is at this URL; `""` if it has none."""

    dashboard: str


@dataclass(frozen=True)
class TrialWaits:
    """A trial will be run: of `strategy`, under the `variant` of the settings that it names (`""` without a space)."""

    strategy: str
    variant: str = ""


@dataclass(frozen=True)
class TrialStarted:
    """Ray Tune started the trial of `strategy`, or started it again."""

    strategy: str
    variant: str = ""


@dataclass(frozen=True)
class StepFinished:
    """A trial has a step: `score` and `best_score` in percent, None without validation.

    `loaded` says that another trial, or an earlier run, computed it; `seconds` is what that took. `example_errors` are what
    the program or the metric raised for examples, and for how many.
    """

    strategy: str
    prefix: str
    score: float | None
    best_score: float | None
    seconds: float
    loaded: bool = False
    variant: str = ""
    example_errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialLost:
    """A trial lost its infrastructure, for the reason given, and is run again."""

    strategy: str
    reason: str
    variant: str = ""


@dataclass(frozen=True)
class TrialEnded:
    """A trial is over; `error` says why, if it ended early."""

    strategy: str
    error: str | None
    variant: str = ""


@dataclass(frozen=True)
class ServerChanged:
    """A model server does something else now, or got further with a training. State `"gone"`: it was released, or died."""

    server: int
    state: str
    weights_id: str | None
    holder: str | None
    detail: str


@dataclass(frozen=True)
class ServerReplaced:
    """A model server was lost, or could not go to other weights in place: for the reason given it is started anew."""

    server: int
    reason: str


@dataclass(frozen=True)
class ServerDid:
    """A model server's state changed.

    Attributes:
        at: Unix time in seconds.
        server: Its number.
        state: `"placing"` (it waits for room on the cluster), `"idle"`, `"serving, start"`, `"serving, swap"`,
            `"serving, reopened"`, `"serving, kept"`, `"training"`, `"lost"`, `"failed"`, `"leaving"` (its
            node is going away), `"released"` or `"dead"`.
        weights_id: Of the weights that it serves, or trains from.
        seconds: What it took to get there.
        reason: Why, where that is not plain; after a failure with the process's last log lines.
    """

    at: float
    server: int
    state: str
    weights_id: str | None = None
    seconds: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class LeaseChanged:
    """A lease was asked for, granted, revoked, has failed or ended; or its holder died, whose leases all ended.

    Attributes:
        at: Unix time in seconds.
        lease: Its number; None of all that a dead holder had.
        state: `"asked"`, `"granted"`, `"revoked"`, `"failed"`, `"ended"` or `"holder died"`.
        holder: The trial.
        weights_id: What its requests ask for, or its training starts from.
        exclusive: Whether it is for a training.
        server: The server's number.
    """

    at: float
    lease: int | None
    state: str
    holder: str | None = None
    weights_id: str | None = None
    exclusive: bool | None = None
    server: int | None = None


Recorded = ServerDid | LeaseChanged


def event_line(event: Recorded) -> dict[str, Any]:
    """An event as it stands in `events.jsonl`: its kind, and what is known of it."""
    kind = "server" if isinstance(event, ServerDid) else "lease"
    return {"kind": kind, **{name: value for name, value in asdict(event).items() if value not in (None, "")}}


Event = (
    Stage | Connected | TrialWaits | TrialStarted | StepFinished | TrialLost | TrialEnded | ServerChanged | ServerReplaced
)
