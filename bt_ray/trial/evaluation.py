"""Evaluations of programs by DSPy, in one process: the metric's value for each example, and what was raised for it."""

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import dspy
from dspy.utils.callback import BaseCallback

from bt_ray.errors import TaskError
from bt_ray.run_dir.results import one_line
from bt_ray.task.metric import refuse_non_finite
from bt_ray.trial.failure_latch import FailureLatch
from bt_ray.trial.failures import is_lost_answer


@dataclass(frozen=True)
class Limits:
    """What bounds an evaluation; None: as DSPy's settings say.

    Attributes:
        num_threads: Examples at a time.
        max_errors: Failed examples that stop it.
        provide_traceback: Whether their tracebacks are logged.
    """

    num_threads: int | None = None
    max_errors: int | None = None
    provide_traceback: bool | None = None

    @property
    def most_errors(self) -> int:
        return int(dspy.settings.max_errors) if self.max_errors is None else self.max_errors


@dataclass(frozen=True)
class Scores:
    """What an evaluation gave.

    Attributes:
        of_examples: The metric's value for each example, in order.
        errors: What the program or the metric raised for examples, which scored 0 for that.
    """

    of_examples: tuple[float, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def percent(self) -> float:
        """As `dspy.Evaluate` has it."""
        return round(100 * sum(self.of_examples) / len(self.of_examples), 2)


class Evaluator(Protocol):
    """Evaluates programs of one task."""

    def scores(self, program: dspy.Module, examples: Sequence[dspy.Example], limits: Limits) -> Scores:
        """Evaluate `program`.

        Raises:
            TaskError: `limits.max_errors` examples failed.
            InfrastructureFailure: An answer was lost; no score is made of that.
        """


class LocalEvaluator:
    """Evaluates in threads of this process.

    Args:
        metric: The task's.
        latch: Told of lost answers.
    """

    def __init__(self, metric: Callable[..., Any], latch: FailureLatch) -> None:
        self._metric = metric
        self._latch = latch
        self._ambient_lm = dspy.settings.lm

    def scores(self, program: dspy.Module, examples: Sequence[dspy.Example], limits: Limits) -> Scores:
        errors: list[str] = []
        evaluate = dspy.Evaluate(
            devset=list(examples),
            metric=report_lost_answers(refuse_non_finite(self._metric), self._latch, errors),
            num_threads=limits.num_threads,
            max_errors=limits.max_errors,
            display_table=False,
            display_progress=False,
            provide_traceback=limits.provide_traceback,
        )
        others = [callback for callback in dspy.settings.callbacks if not isinstance(callback, LostAnswers)]
        try:
            # A metric that asks a model must not be judged by the student.
            with dspy.context(lm=self._ambient_lm, callbacks=[*others, LostAnswers(self._latch)]):
                result = evaluate(report_lost_answers(program, self._latch, errors))
        except Exception as error:
            self._latch.check()
            if "Execution cancelled" in str(error):
                raise explain_stop(limits, error) from error
            raise
        return _finite(Scores(tuple(float(score) for _, _, score in result.results), tuple(errors)))


def _finite(scores: Scores) -> Scores:
    """The scores. Raises `TaskError` if they are too large for a mean."""
    if scores.of_examples and not math.isfinite(100 * sum(scores.of_examples)):
        largest = max(scores.of_examples, key=abs)
        raise TaskError(f"The metric's scores are too large to add up; the largest is {largest:g}. Scores are from 0 to 1.")
    return scores


def report_lost_answers(call: Callable[..., Any], latch: FailureLatch, errors: list[str]) -> Callable[..., Any]:
    """A program or a metric for an evaluation, whose lost answers reach the latch: DSPy would score the example 0 for them.

    What else it raises, for which the example scores 0, is added to `errors`.
    """
    attempt = latch.attempt

    def call_wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if is_lost_answer(error):
                raise latch.trip(error, attempt) from error
            errors.append(one_line(error))
            raise

    return call_wrapped


class LostAnswers(BaseCallback):  # type: ignore[misc]
    """Tells the latch of each answer that was lost to an optimizer: DSPy's go on, as if its proposal or program were bad.

    Only the outermost of DSPy's calls is looked at: a program may well go on without an answer that it asked for itself.
    """

    def __init__(self, latch: FailureLatch) -> None:
        self._latch, self._attempt = latch, latch.attempt
        self._depth: ContextVar[int] = ContextVar("depth", default=0)

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._depth.set(self._depth.get() + 1)

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._depth.set(self._depth.get() - 1)
        if self._depth.get() == 0 and isinstance(exception, Exception) and is_lost_answer(exception):
            self._latch.trip(exception, self._attempt)

    on_lm_start, on_lm_end = on_module_start, on_module_end


def explain_stop(limits: Limits, error: Exception | None = None) -> TaskError:
    """The error for an evaluation with too many failed examples, which DSPy calls cancelled: it says what to do."""
    said = f" DSPy says: {error}" if error is not None else ""
    return TaskError(
        f"The evaluation was stopped after {limits.most_errors} failed examples (max_errors): the metric raised, or answers "
        f"did not parse. The trial's log has them. If the model is only weak, set max_errors higher.{said}"
    )
