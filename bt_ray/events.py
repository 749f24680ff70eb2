"""What happens during a sweep, as frozen records. The driver makes them; whoever shows progress reads them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """The driver turned to something new: connecting, placing servers, the test at the end."""

    text: str


@dataclass(frozen=True)
class TrialStarted:
    """Ray Tune started the trial of `strategy`, or started it again."""

    strategy: str


@dataclass(frozen=True)
class StepFinished:
    """A trial has a step: `score` and `best_score` in percent, None without validation.

    `loaded` says that another trial, or an earlier run, computed it; `seconds` is what that took.
    """

    strategy: str
    prefix: str
    score: float | None
    best_score: float | None
    seconds: float
    loaded: bool = False


@dataclass(frozen=True)
class TrialLost:
    """A trial lost its infrastructure, for the reason given, and is run again."""

    strategy: str
    reason: str


@dataclass(frozen=True)
class TrialEnded:
    """A trial is over; `error` says why, if it ended early."""

    strategy: str
    error: str | None


@dataclass(frozen=True)
class ServerChanged:
    """A model server does something else now, or got further with a training."""

    server: int
    state: str
    weights_id: str | None
    holder: str | None
    detail: str


Event = Stage | TrialStarted | StepFinished | TrialLost | TrialEnded | ServerChanged
