"""One walk of a strategy alone: its steps are kept on a real store, and nobody else wants them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from bt_ray.run_dir.results import StepFailure
from bt_ray.run_dir.step_store import FinishedStep, StepStore
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import make_config
from bt_ray.step import StepKey
from bt_ray.strategy import parent, prefixes
from bt_ray.task.fingerprint import digest
from bt_ray.task.task import Task
from bt_ray.trial.better_together import StepOutcome, SweepBetterTogether
from bt_ray.trial.evaluation import LocalEvaluator
from bt_ray.trial.lm import ServedEngine, ServedLM, assign_lm
from bt_ray.trial.program_lms import ServedModels
from bt_ray.trial.steps import KeptSteps


class SoleClaims:
    """Grants every claim."""

    def __init__(self) -> None:
        self.granted = 0

    def claim(self, key: str, before_waiting: object) -> int:
        self.granted += 1
        return self.granted

    def may_commit(self, key: str, fence: int) -> bool:
        return True

    def end(self, key: str, fence: int, *, committed: bool = False, failure: StepFailure | None = None) -> None:
        """Nobody waits for it."""


class OwnSteps(KeptSteps):
    """Keeps the steps of one strategy in `folder`, and lists what each gave."""

    def __init__(
        self,
        folder: Path,
        strategy: str,
        program: dspy.Module,
        engine: ServedEngine,
        claims: SoleClaims | None = None,
        keys: Mapping[str, StepKey] | None = None,
    ) -> None:
        keys = keys or {
            prefix: StepKey(prefix, digest(prefix), digest(parent(prefix)), {}, trains=False)
            for prefix in ["", *prefixes(strategy)]
        }
        store = StepStore(open_storage(str(folder)))
        models = ServedModels(engine, make_config({"task": "unused:unused", "strategies": [strategy]}))
        super().__init__(
            store,
            claims or SoleClaims(),
            keys,
            program,
            models,
            give_back=lambda: None,
            on_claim=lambda prefix: None,
            on_step=lambda step, loaded: None,
        )
        self.outcomes: list[StepOutcome] = []

    def outcome(self, step: FinishedStep, *, loaded: bool) -> StepOutcome:
        kept = super().outcome(step, loaded=loaded)
        if not loaded:
            self.outcomes.append(kept)
        return kept


@dataclass(frozen=True)
class SoleWalk:
    """What a walk gave: the program that was returned, each step's outcome, and how the step failed that ended it early."""

    program: dspy.Module
    outcomes: list[StepOutcome]
    failure: StepFailure | None


def sole_walk(task: Task, lm: ServedLM, strategy: str, *, seed: int = 0, retries: int = 0, **arguments: Any) -> SoleWalk:
    """bt_ray's walk of `strategy`, with `lm` for the predictors that have none."""
    engine: ServedEngine = lm.engine
    folder: Path = engine.models.work_dir
    assign_lm(task.program, lm)
    steps = OwnSteps(folder, strategy, task.program, engine)
    assert engine.latch is not None
    evaluator = LocalEvaluator(task.metric, engine.latch)
    optimizer = SweepBetterTogether(
        task,
        lm,
        seed=seed,
        scratch_dir=lambda prefix: folder,
        engine=engine,
        evaluator=evaluator,
        steps=steps,
        retries=retries,
    )
    program = optimizer.walk(strategy, **arguments)
    return SoleWalk(program, steps.outcomes, optimizer.failure)
