"""A search over strategies as it goes: what is under way, what it has cost, and when it is over."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

from bt_ray.driver.search_model import StrategySearch
from bt_ray.run_dir.results import Expected
from bt_ray.run_dir.step_store import FinishedStep
from bt_ray.settings.config import StrategySearch as SearchSettings
from bt_ray.strategy import BASELINE, every, parent, prefixes


@dataclass
class Spent:
    """What steps have cost. The baseline costs no step."""

    gpus: float
    steps: int = 0
    tokens: int = 0
    gpu_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def add(self, seconds: float, tokens: int) -> None:
        self.tokens += tokens
        self.gpu_seconds += seconds * self.gpus

    def of(self, unit: str) -> float:
        """How much of one of `bt_ray.settings.config.BUDGETS`."""
        hours = (time.monotonic() - self.started) / 3600
        return {"steps": self.steps, "tokens": self.tokens, "hours": hours, "gpu-hours": self.gpu_seconds / 3600}[unit]


class SearchWalk:
    """Decides which strategy is walked next, from what the steps of all have scored.

    What finished in an earlier run counts as if this one had computed it, except for its time. What was taken from another
    run directory costs nothing.

    Args:
        settings: The search.
        optimizers: The keys that strategies are made of.
        finished: The steps that are finished, by prefix.
        gpus: Of each server.
        seed: The sweep's.
    """

    def __init__(
        self,
        settings: SearchSettings,
        optimizers: Sequence[str],
        finished: Mapping[str, FinishedStep],
        *,
        gpus: float,
        seed: int,
    ) -> None:
        self.strategies: list[str] = []
        """Those that were walked, in order."""
        self._limit, self._unit = settings.limit
        self._budget = settings.budget
        self._all = every(optimizers, settings.max_length)
        self._search = StrategySearch(optimizers, settings.max_length, seed=seed)
        self._known: set[str] = set()
        self._failed: set[str] = set()
        self._under_way: set[str] = set()
        self._spent = Spent(gpus)
        self._scored = False
        self._lock = Lock()
        for prefix, step in finished.items():
            if not step.origin:
                self._spent.add(step.seconds, step.prompt_tokens + step.completion_tokens)
            self._observe(prefix, step.score, free=bool(step.origin))

    def next(self) -> str | None:
        """The strategy to walk now; None if there is none, at least until more is known."""
        with self._lock:
            return self._next()

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way, and nothing more will be."""
        with self._lock:
            return not self._under_way and self._suggest() is None

    def note_finished(self, prefix: str, score: float | None, seconds: float, tokens: int, *, loaded: bool) -> None:
        """A step is there; `loaded` if it was computed before, by whomever."""
        with self._lock:
            if not loaded:
                self._spent.add(seconds, tokens)
            self._observe(prefix, score)

    def note_ended(self, strategy: str) -> None:
        """A trial is over. What it lacks cannot be computed."""
        with self._lock:
            self._under_way.discard(strategy)
            lacking = next((prefix for prefix in prefixes(strategy) if prefix not in self._known), None)
            if lacking is not None:
                self._failed.add(lacking)
                self._search.note_failed(lacking)

    def find_believed(self) -> Expected | None:
        """The finished step that is believed to be the best; None before any has a score."""
        if not self._scored:
            return None
        best = self._search.best()
        return Expected(best, *self._search.expect(best))

    def find_skipped(self) -> tuple[Expected, ...]:
        """The steps that could have come next and were not tried, the most promising first."""
        found = []
        for prefix in self._all:
            if prefix in self._known or (parent(prefix) not in self._known and parent(prefix) != BASELINE):
                continue
            reason = "it failed" if prefix in self._failed else f"the budget of {self._budget} was spent"
            found.append(Expected(prefix, *self._search.expect(prefix), reason))
        return tuple(sorted(found, key=lambda step: -step.score))

    def _observe(self, prefix: str, score: float | None, *, free: bool = False) -> None:
        # It counts with the first who reports it: that may be one who loaded it, before the one who computed it.
        self._spent.steps += prefix != BASELINE and prefix not in self._known and not free
        self._known.add(prefix)
        if score is not None:
            self._search.observe(prefix, score)
            self._scored = True

    def _next(self) -> str | None:
        strategy = self._suggest()
        if strategy is not None:
            self._under_way.add(strategy)
            self.strategies.append(strategy)
        return strategy

    def _suggest(self) -> str | None:
        if self._spent.of(self._unit) >= self._limit:
            return None
        promised = {p for strategy in self._under_way for p in prefixes(strategy)} - self._known
        left = int(self._limit) - self._spent.steps - len(promised) if self._unit == "steps" else None
        return self._search.suggest(self._under_way, left) if left is None or left > 0 else None
