"""`dspy.BetterTogether` with a hook around each step.

DSPy stays in charge of the sequence: splits, shuffles, validation, ranking, ties, early stop. This subclass builds fresh
optimizers for each step inside the context of the student's LM, takes each step from the store or has it kept there with
its per-example scores, and lets lost infrastructure through. `docs/differences.md` lists where that differs from DSPy.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, Protocol

import dspy
from dspy.teleprompt.bootstrap_finetune import FinetuneTeleprompter
from dspy.teleprompt.teleprompt import Teleprompter

from bt_ray.errors import TaskError
from bt_ray.run_dir.results import StepFailure, failure_of
from bt_ray.strategy import BASELINE, SEPARATOR
from bt_ray.task.task import StepContext, Task, step_seed
from bt_ray.task.teachers import stand_in_for
from bt_ray.trial.evaluation import Evaluator, Limits, LostAnswers, Scores
from bt_ray.trial.lm import STEP_SETTING, EmptyTrainingSet, ServedEngine, student_lm
from bt_ray.trial.program_losses import LostInKeeping

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave.

    Attributes:
        prefix: The step; `""` for the baseline.
        program: The program as the step left it.
        score: In percent, None without validation.
        example_scores: The metric's value for each valset example, in order.
        started: Unix time in seconds.
        seconds: Compiling and evaluating.
        example_errors: What the program or the metric raised for examples, which scored 0 for that, and for how many.
    """

    prefix: str
    program: dspy.Module
    score: float | None
    example_scores: tuple[float, ...]
    started: float
    seconds: float
    example_errors: Mapping[str, int] = field(default_factory=dict)


class Claim(Protocol):
    """A step that is finished, or that is this trial's to compute."""

    finished: StepOutcome | None

    def commit(self, outcome: StepOutcome) -> StepOutcome:
        """Keep what was computed, and return it as it was kept."""


class Steps(Protocol):
    """Who keeps finished steps, and decides who computes one."""

    def keep(self, program: dspy.Module) -> dspy.Module:
        """`program` as it is rebuilt from what is kept of it. Raises `LostInKeeping` if it would be another."""

    def claim(self, prefix: str) -> AbstractContextManager[Claim]:
        """The step `prefix`, finished or to be computed and committed inside the context."""


class SweepBetterTogether(dspy.BetterTogether):  # type: ignore[misc]
    """Walks one strategy of a task.

    Args:
        task: The user's task; its program's predictors have LMs.
        lm: The LM to build the first optimizers with.
        seed: The sweep's seed.
        scratch_dir: Makes the folder that a step, named by its prefix, has for its own files.
        engine: The engine of the served LMs, whose latch is looked at before a step counts.
        evaluator: Evaluates its programs.
        steps: Who keeps finished steps.
        retries: How often a step is repeated that lost its infrastructure.
    """

    def __init__(
        self,
        task: Task,
        lm: dspy.LM,
        *,
        seed: int,
        scratch_dir: Callable[[str], Path],
        engine: ServedEngine,
        evaluator: Evaluator,
        steps: Steps,
        retries: int = 0,
    ) -> None:
        self._task = task
        self._seed = seed
        self._scratch_dir = scratch_dir
        assert engine.latch is not None
        self._engine, self._latch = engine, engine.latch
        self._steps = steps
        self._retries = retries
        self._evaluator = evaluator
        self._scores = Scores()
        self.failure: StepFailure | None = None
        """How the step failed that ended the strategy early, None if none did."""
        super().__init__(metric=task.metric, **task.build_optimizers(self._context(BASELINE, lm)))

    def walk(self, strategy: str, **compile_arguments: Any) -> dspy.Module:
        """Compile the task's program with `strategy`; as `dspy.BetterTogether.compile`, with its attributes."""
        return self.compile(
            self._task.program,
            trainset=list(self._task.trainset),
            valset=list(self._task.valset) if self._task.valset else None,
            seed=self._seed,
            strategy=strategy,
            optimizer_compile_args=self._task.compile_args(self.optimizers),
            **compile_arguments,
        )

    def _run_strategies(self, student: dspy.Module, *args: Any, **kwargs: Any) -> dspy.Module:
        with self._step(BASELINE):
            return super()._run_strategies(student, *args, **kwargs)

    def _run_and_evaluate_step(
        self,
        optimizer: Teleprompter,
        student: dspy.Module,
        teacher: list[dspy.Module] | None,
        trainset: list[dspy.Example],
        valset: list[dspy.Example] | None,
        compile_args: dict[str, Any],
        candidate_programs: list[dict[str, Any]],
        current_strategy: str,
        *rest: Any,
    ) -> tuple[dspy.Module, float | None, bool, bool]:
        def compute() -> StepOutcome:
            given = (student.deepcopy(), teacher, trainset, valset)
            return self._compute(current_strategy, given, rest)

        best_before = max((candidate["score"] or 0.0 for candidate in candidate_programs), default=0.0)
        lms_before = [predictor.lm for predictor in student.predictors()]
        try:
            with self._step(current_strategy):
                outcome = self._load_or_compute(current_strategy, compute)
        except Exception as error:
            self.failure = failure_of(error)
            raise
        self._add_candidate(candidate_programs, outcome.program, current_strategy, outcome.score)
        is_new_best = outcome.score is not None and outcome.score >= best_before
        return outcome.program, outcome.score, is_new_best, self._models_changed(outcome.program, lms_before)

    def _load_or_compute(self, prefix: str, compute: Callable[[], StepOutcome]) -> StepOutcome:
        """The step as it is on the store, computed if it is not there yet; again if infrastructure was lost meanwhile."""

        def attempt() -> StepOutcome:
            with self._step(prefix):
                outcome = compute()
            self._latch.check()
            return outcome

        name = f"Step {prefix or 'baseline'!r}"
        with self._steps.claim(prefix) as claim:
            if claim.finished is not None:
                return claim.finished
            outcome = self._latch.retry(attempt, self._retries, name)
            return self._latch.retry(lambda: claim.commit(outcome), self._retries, f"{name}, whose result is kept,")
        raise AssertionError("a claim does not swallow exceptions")

    def _compute(self, prefix: str, given: tuple[Any, ...], rest: tuple[Any, ...]) -> StepOutcome:
        """Compile and evaluate with DSPy's own step.

        Args:
            prefix: The step.
            given: The student, the teacher, the trainset and the valset.
            rest: DSPy's further arguments.
        """
        started = time.time()
        key = prefix.rpartition(SEPARATOR)[2]
        student, teacher, trainset, valset = given
        lm = student_lm(student)
        compile_args: dict[str, Any] = {}
        try:
            with dspy.context(lm=lm, callbacks=[*dspy.settings.callbacks, LostAnswers(self._latch)]):
                optimizers = self._task.build_optimizers(self._context(prefix, lm))
                optimizer, compile_args = optimizers[key], self._task.compile_args(optimizers).get(key, {})
                stand_in_for(student, compile_args.get("teacher"))
                refuse_optimizer_that_mixes_lms(optimizer, student)
                compiled, score, _, _ = super()._run_and_evaluate_step(
                    optimizer, student, teacher, trainset, valset, compile_args, [], prefix, *rest
                )
        except EmptyTrainingSet as error:
            raise _without_data(compile_args, trainset) from error
        except LostInKeeping as error:
            raise _not_kept(f"{type(optimizer).__name__} (optimizer {key!r})", error) from error
        except Exception:
            self._latch.check()
            raise
        return self._outcome(prefix, compiled, score, started)

    def _evaluate_on_valset(
        self,
        program: dspy.Module,
        valset: list[dspy.Example] | None,
        rng: random.Random,
        num_threads: int | None,
        effective_max_errors: int | None,
        provide_traceback: bool | None,
    ) -> float | None:
        def evaluate() -> float | None:
            return self._evaluate(program, valset, num_threads, effective_max_errors, provide_traceback)

        def baseline() -> StepOutcome:
            started = time.time()
            try:
                score = evaluate()
            except LostInKeeping as error:
                raise _not_kept("The task", error) from error
            return self._outcome(BASELINE, program, score, started)

        return self._load_or_compute(BASELINE, baseline).score if self._running == BASELINE else evaluate()

    def _evaluate(
        self,
        program: dspy.Module,
        valset: list[dspy.Example] | None,
        num_threads: int | None,
        max_errors: int | None,
        provide_traceback: bool | None,
    ) -> float | None:
        drop_traced_forward(program)
        self._scores = Scores()
        kept = self._steps.keep(program)
        if not valset:
            return None
        self._scores = self._evaluator.scores(kept, valset, Limits(num_threads, max_errors, provide_traceback))
        return self._scores.percent

    def _outcome(self, prefix: str, program: dspy.Module, score: float | None, started: float) -> StepOutcome:
        """What a step gave whose program was evaluated last."""
        scores, errors = self._scores.of_examples, Counter(self._scores.errors)
        return StepOutcome(prefix, program, score, scores, started, time.time() - started, errors)

    def _step(self, prefix: str) -> Any:
        """The context that the threads of an attempt at a step inherit; requests of any other are refused from now on."""
        self._running = prefix
        self._engine.step = f"{prefix or 'baseline'}, attempt {self._latch.attempt}"
        return dspy.context(**{STEP_SETTING: self._engine.step})

    def _context(self, prefix: str, lm: dspy.LM) -> StepContext:
        return StepContext(prefix=prefix, seed=step_seed(self._seed, prefix), scratch_dir=self._scratch_dir(prefix), lm=lm)


def refuse_optimizer_that_mixes_lms(optimizer: Teleprompter, student: dspy.Module) -> None:
    """Raises `TaskError` for a prompt optimizer on predictors with different LMs.

    DSPy's prompt optimizers reset the LMs of their copies, so that all predictors would ask the context's one LM.
    """
    models = {predictor.lm.model for predictor in student.predictors()}
    if len(models) > 1 and not isinstance(optimizer, FinetuneTeleprompter):
        raise TaskError(
            f"{type(optimizer).__name__} cannot optimize a program whose predictors use different LMs "
            f"({', '.join(sorted(models))}): DSPy would answer all of them with one."
        )


def drop_traced_forward(program: dspy.Module) -> None:
    """Remove the instance attribute `forward` that `bootstrap_trace_data` leaves behind.

    It is bound to the program that was traced, so copies of the program would run the original's predictors.
    """
    forward = program.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__func__ is getattr(type(program), "forward", None):
        del program.__dict__["forward"]


def _not_kept(who: str, error: LostInKeeping) -> TaskError:
    return TaskError(
        f"{who} made a program that would not be kept as it is. What would be lost: {error.shown}. JSON holds instructions, "
        "what fields are called and described as, demos, `config` and how LMs sample; all else comes from the task. So the "
        "program that was scored would not be the one that is kept. Let build() make what would be lost, or leave it out."
    )


def _without_data(compile_args: dict[str, Any], trainset: Sequence[dspy.Example]) -> TaskError:
    teacher = compile_args.get("teacher")
    teachers = len(teacher) if isinstance(teacher, list) else 1
    traces = teachers * len(compile_args.get("trainset", trainset))
    return TaskError(
        f"There is nothing to train on: the metric's filter left none of the {traces} bootstrapped traces. A stronger "
        "teacher, `bt_ray.gold_label_teacher`, or a metric that accepts more would leave some."
    )
