"""What a sweep found: frozen candidates, trials and the ranked whole, as JSON in `result.json`."""

import importlib
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from bt_ray.errors import ConfigError, StepFailed, StorageError
from bt_ray.location import parent_and_name
from bt_ray.run_dir.storage import open_storage
from bt_ray.strategy import length, step_label

SCHEMA_VERSION = 1


def candidate_name(prefix: str, variant: str = "") -> str:
    """Names a candidate among those of a sweep: `"p -> w"`, `"baseline"`, under a variant `"p -> w [seed=1]"`."""
    return step_label(prefix or "baseline", variant)


@dataclass(frozen=True)
class Candidate:
    """The program that a step produced, with its score.

    Attributes:
        strategy: The strategy of the trial that produced it.
        prefix: The step; `""` for the baseline.
        score: On the valset, in percent as `dspy.Evaluate` gives it; None without validation.
        example_scores: The metric's value for each valset example, in order.
        started: Unix time in seconds.
        seconds: Compiling and evaluating.
        weights: The id of the weights that each predictor uses, by the predictor's name.
        program: DSPy's JSON state of the program, relative to the run directory.
        api_models: The model of each predictor whose LM no server of the sweep answers for, by the predictor's name.
        variant: Names the settings of the sweep's space that it was computed under; `""` without a space.
        example_errors: What the program or the metric raised for examples, which scored 0 for that, and for how many.
        test_score: On the testset, in percent; None if it was not evaluated there.
        test_example_scores: The metric's value for each test example, in order.
        valset: A hash of the validation examples. Scores of programs with different ones say nothing of each other.
        testset: A hash of the test examples, likewise.
        origin: The run directory that its step was taken from; `""` if it was computed in the sweep's own.
        run_dir: Where it is kept; `""` outside of a result.
    """

    strategy: str
    prefix: str
    score: float | None
    example_scores: tuple[float, ...]
    started: float
    seconds: float
    weights: dict[str, str]
    program: str
    api_models: dict[str, str] = field(default_factory=dict)
    variant: str = ""
    example_errors: dict[str, int] = field(default_factory=dict)
    test_score: float | None = None
    test_example_scores: tuple[float, ...] = ()
    valset: str = ""
    testset: str = ""
    origin: str = ""
    run_dir: str = field(default="", compare=False, repr=False)

    @property
    def name(self) -> str:
        """Names it among the candidates of its sweep."""
        return candidate_name(self.prefix, self.variant)

    def load(self, task: Any = None, **served: Any) -> Any:
        """The program, ready to answer, as `bt_ray.load` gives it, whose arguments this takes."""
        if not self.run_dir:
            raise ConfigError(f'Candidate "{self.name}" does not say where it is kept: take it from a result.')
        surface = importlib.import_module("bt_ray")  # stands above all layers, and is there by the time that this is called
        return surface.load(self.run_dir, task, candidate=self.name, **served)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "run_dir"}

    @property
    def rank_key(self) -> tuple[float, int]:
        """Sorts the best first: the higher score, then the fewer steps. `sorted` keeps the given order in a tie."""
        return (-self.score if self.score is not None else float("inf"), length(self.prefix))


@dataclass(frozen=True)
class StepFailure:
    """How the user's part of a step failed."""

    message: str
    traceback: str


def failure_of(error: Exception) -> StepFailure:
    """`error` as a value. That of a step which another trial computed is one already."""
    if isinstance(error, StepFailed):
        return StepFailure(str(error), error.traceback)
    return StepFailure(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def best_so_far(scores: Iterable[float | None]) -> list[float | None]:
    """The best score up to each one, None where nothing was validated yet."""
    return list(accumulate(scores, lambda best, score: max((s for s in (best, score) if s is not None), default=None)))


def one_line(error: Exception) -> str:
    """`error` in a line: its kind, and what it says first."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


@dataclass(frozen=True)
class TrialResult:
    """How one strategy went.

    Attributes:
        strategy: The strategy.
        candidates: The baseline and each finished step, in order.
        error: Why it ended early, None if it did not.
        traceback: Of that error.
        settings: Those of the sweep's space, by name; empty without a space.
    """

    strategy: str
    candidates: tuple[Candidate, ...] = ()
    error: str | None = None
    traceback: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Candidate | None:
        """By BetterTogether's rule: the best score, the earlier in a tie; without validation the latest."""
        if all(candidate.score is None for candidate in self.candidates):
            return self.candidates[-1] if self.candidates else None
        return min(self.candidates, key=lambda candidate: candidate.rank_key)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "candidates": [candidate.to_json() for candidate in self.candidates]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "candidates": tuple(_candidate(candidate) for candidate in values["candidates"])})


def _candidate(values: dict[str, Any]) -> Candidate:
    scores = {name: tuple(values.get(name, ())) for name in ("example_scores", "test_example_scores")}
    return Candidate(**{**values, **scores})


@dataclass(frozen=True)
class Expected:
    """What a search over strategies believes of a step.

    Attributes:
        prefix: The step.
        score: Its true score, in percent.
        spread: The standard deviation of that.
        reason: Why it was not tried, if it was not.
    """

    prefix: str
    score: float
    spread: float
    reason: str = ""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        run_dir: Where it is kept.
        trials: One for each strategy, in the order given.
        candidates: All candidates, the best first.
        best: The best program's candidate, None if every strategy failed before its baseline.
        seconds: Wall time of the sweep.
        skipped: Steps that a search over strategies did not try, the most promising first.
        believed: The finished step that a search believes to be the best. Not always the one with the highest score, for
            that may be luck.
    """

    run_dir: str
    trials: tuple[TrialResult, ...]
    seconds: float
    skipped: tuple[Expected, ...] = ()
    believed: Expected | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        kept_here = [
            replace(trial, candidates=tuple(replace(candidate, run_dir=self.run_dir) for candidate in trial.candidates))
            for trial in self.trials
        ]
        object.__setattr__(self, "trials", tuple(kept_here))

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        found = [candidate for trial in self.trials for candidate in trial.candidates]
        return tuple(sorted(found, key=lambda candidate: candidate.rank_key))

    @property
    def best(self) -> Candidate | None:
        candidates = self.candidates
        if not candidates or candidates[0].score is not None:
            return candidates[0] if candidates else None
        return self.trials[0].best

    @property
    def valsets(self) -> int:
        """How many different valsets its programs were ranked by."""
        return len({candidate.valset for candidate in self.candidates if candidate.score is not None})

    @property
    def test_score(self) -> float | None:
        """Of the best program on the testset, in percent; None without a testset, or before it was evaluated there."""
        return self.best.test_score if self.best is not None else None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "run_dir": self.run_dir,
            "seconds": self.seconds,
            "best": self.best.to_json() if self.best else None,
            "test_score": self.test_score,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "trials": [trial.to_json() for trial in self.trials],
            "skipped": [asdict(step) for step in self.skipped],
            "believed": asdict(self.believed) if self.believed else None,
        }

    @classmethod
    def read(cls, file: str | Path) -> Self:
        """The result that a sweep left in `file`, its `result.json`: a path, or a URI. Its `run_dir` is where it is now.

        Raises:
            StorageError: It cannot be read.
        """
        run_dir, name = parent_and_name(str(file))
        values = open_storage(run_dir).read_json(name)
        if values is None:
            raise StorageError(f"{file} is no result of a sweep.")
        return cls.from_json({**values, "run_dir": run_dir})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(
            run_dir=values["run_dir"],
            trials=tuple(TrialResult.from_json(trial) for trial in values["trials"]),
            seconds=values["seconds"],
            skipped=tuple(Expected(**step) for step in values.get("skipped", ())),
            believed=Expected(**values["believed"]) if values.get("believed") else None,
            schema_version=values["schema_version"],
        )
