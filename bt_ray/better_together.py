"""`dspy.BetterTogether` with a hook around each step.

DSPy stays in charge of the sequence: splits, shuffles, validation, ranking, ties, early stop. This subclass builds fresh
optimizers for each step inside the context of the student's LM, keeps the per-example scores, tells a listener what each
step gave, and lets lost infrastructure through. `docs/differences.md` lists where that differs from DSPy, and why.
"""

import random
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import dspy
from dspy.teleprompt.bootstrap_finetune import FinetuneTeleprompter
from dspy.teleprompt.teleprompt import Teleprompter

from bt_ray.errors import TaskError
from bt_ray.hosting import FailureLatch
from bt_ray.lm import STEP_SETTING, EmptyTrainingSet, ServedEngine
from bt_ray.strategy import BASELINE, SEPARATOR
from bt_ray.task import StepContext, Task
from bt_ray.teachers import stand_in_for


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
    """

    prefix: str
    program: dspy.Module
    score: float | None
    example_scores: tuple[float, ...]
    started: float
    seconds: float


class SweepBetterTogether(dspy.BetterTogether):  # type: ignore[misc]
    """Walks one strategy of a task.

    Args:
        task: The user's task; its program's predictors have LMs.
        lm: The LM to build the first optimizers with.
        seed: The sweep's seed.
        scratch_dir: Where each step gets a folder of its own.
        engine: The engine of the served LMs, None if the program has none.
        latch: Looked at before a step counts.
        on_step: Told of the baseline and of each finished step.
    """

    def __init__(
        self,
        task: Task,
        lm: dspy.LM,
        *,
        seed: int,
        scratch_dir: Path,
        latch: FailureLatch,
        engine: ServedEngine | None,
        on_step: Callable[[StepOutcome], None],
    ) -> None:
        self._task = task
        self._seed = seed
        self._scratch_dir = scratch_dir
        self._latch = latch
        self._engine = engine
        self._on_step = on_step
        self._ambient_lm = dspy.settings.lm
        self._example_scores: tuple[float, ...] = ()
        self.step_error: tuple[str, str] | None = None
        """Message and traceback of the step that ended the strategy early, None if none did."""
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
        started = time.time()
        key = current_strategy.rpartition(SEPARATOR)[2]
        try:
            lm = student_lm(student)
            with self._step(current_strategy), dspy.context(lm=lm):
                optimizers = self._task.build_optimizers(self._context(current_strategy, lm))
                optimizer, compile_args = optimizers[key], self._task.compile_args(optimizers).get(key, {})
                stand_in_for(student, compile_args.get("teacher"))
                refuse_optimizer_that_mixes_lms(optimizer, student)
                outcome: tuple[dspy.Module, float | None, bool, bool] = super()._run_and_evaluate_step(
                    optimizer, student, teacher, trainset, valset, compile_args, candidate_programs, current_strategy, *rest
                )
            self._latch.check()
            compiled, score, _, _ = outcome
            seconds = time.time() - started
            self._on_step(StepOutcome(current_strategy, compiled, score, self._example_scores, started, seconds))
        except Exception as error:
            self._latch.check()
            if isinstance(error, EmptyTrainingSet):
                error = _without_data(error, compile_args, trainset)
            self.step_error = (f"{type(error).__name__}: {error}", traceback.format_exc())
            raise error
        return outcome

    def _evaluate_on_valset(
        self,
        program: dspy.Module,
        valset: list[dspy.Example] | None,
        rng: random.Random,
        num_threads: int | None,
        effective_max_errors: int | None,
        provide_traceback: bool | None,
    ) -> float | None:
        drop_traced_forward(program)
        started = time.time()
        score = None
        self._example_scores = ()
        if valset:
            evaluate = dspy.Evaluate(
                devset=valset,
                metric=self.metric,
                num_threads=num_threads,
                max_errors=effective_max_errors,
                display_table=False,
                display_progress=False,
                provide_traceback=provide_traceback,
            )
            try:
                with dspy.context(lm=self._ambient_lm):  # a metric that asks a model must not be judged by the student
                    result = evaluate(program)
            except Exception as error:
                self._latch.check()
                raise _stopped_evaluation(error, effective_max_errors) from error
            score = float(result.score)
            self._example_scores = tuple(float(example_score) for _, _, example_score in result.results)
        self._latch.check()
        if self._running == BASELINE:
            seconds = time.time() - started
            self._on_step(StepOutcome(BASELINE, program, score, self._example_scores, started, seconds))
        return score

    def _step(self, prefix: str) -> Any:
        """The context that a step's threads inherit; requests of any other step are refused from now on."""
        self._running = prefix
        if self._engine is not None:
            self._engine.step = prefix
        return dspy.context(**{STEP_SETTING: prefix})

    def _context(self, prefix: str, lm: dspy.LM) -> StepContext:
        name = prefix.replace(SEPARATOR, "-") or "baseline"
        scratch_dir = self._scratch_dir / name
        scratch_dir.mkdir(parents=True, exist_ok=True)
        return StepContext(prefix=prefix, seed=step_seed(self._seed, prefix), scratch_dir=scratch_dir, lm=lm)


def step_seed(seed: int, prefix: str) -> int:
    """A seed of the step's own, the same whenever and wherever the step is run."""
    return zlib.crc32(f"{seed}:{prefix}".encode())


def student_lm(student: dspy.Module) -> dspy.LM:
    """The LM that a step's optimizers are built with: that of the first predictor."""
    return student.predictors()[0].lm


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


def _stopped_evaluation(error: Exception, max_errors: int | None) -> Exception:
    """DSPy's error for an evaluation with too many failed examples, in words that say what to do; any other as it is."""
    if "Execution cancelled" not in str(error):
        return error
    limit = dspy.settings.max_errors if max_errors is None else max_errors
    return TaskError(
        f"The evaluation was stopped after {limit} failed examples (max_errors): the metric raised, or answers did not "
        f"parse. The trial's log has them. If the model is only weak, set max_errors higher. DSPy says: {error}"
    )


def _without_data(error: EmptyTrainingSet, compile_args: dict[str, Any], trainset: Sequence[dspy.Example]) -> TaskError:
    teacher = compile_args.get("teacher")
    teachers = len(teacher) if isinstance(teacher, list) else 1
    traces = teachers * len(compile_args.get("trainset", trainset))
    told = TaskError(
        f"There is nothing to train on: the metric's filter left none of the {traces} bootstrapped traces. A stronger "
        "teacher, `bt_ray.gold_label_teacher`, or a metric that accepts more would leave some."
    )
    told.__cause__ = error
    return told
