"""An answer that DSPy lost reaches the latch, unless the program that asked for it goes on without."""

from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMServerError
from support import tasks

from bt_ray.errors import InfrastructureFailure
from bt_ray.trial.evaluation import LostAnswers, report_lost_answers
from bt_ray.trial.failure_latch import FailureLatch


class Asking(dspy.Module):  # type: ignore[misc]
    def __init__(self, error: Exception) -> None:
        self.error = error

    def forward(self, question: str) -> Any:
        raise self.error


class Careful(dspy.Module):  # type: ignore[misc]
    """Has an answer of its own where there is none."""

    def __init__(self, asking: Asking) -> None:
        self.asking = asking

    def forward(self, question: str) -> Any:
        try:
            return self.asking(question=question)
        except LMServerError:
            return dspy.Prediction(answer="perhaps")


LOST = LMServerError("no answer")


def run(program: dspy.Module) -> FailureLatch:
    """Evaluate `program`, as an optimizer does, on threads of its own."""
    latch = FailureLatch()
    evaluate = dspy.Evaluate(devset=tasks.examples(range(4)), metric=tasks.exact, num_threads=2, max_errors=100)
    with dspy.context(callbacks=[LostAnswers(latch)]):
        evaluate(program)
    return latch


def test_a_lost_answer_that_leaves_the_program_trips_the_latch() -> None:
    with pytest.raises(InfrastructureFailure, match="no answer"):
        run(Asking(LOST)).check()


def test_one_that_the_program_goes_on_without_does_not() -> None:
    run(Careful(Asking(LOST))).check()


def test_what_an_attempt_left_behind_does_not_fail_the_next_one() -> None:
    latch, left_behind = FailureLatch(), []

    def attempt() -> str:
        left_behind.append(report_lost_answers(Asking(LOST), latch, []))
        if len(left_behind) == 1:
            left_behind[0](question="?")
        with pytest.raises(InfrastructureFailure):
            left_behind[0](question="?")
        return "done"

    assert latch.retry(attempt, 1, "The step") == "done"
    with pytest.raises(InfrastructureFailure):
        latch.retry(lambda: left_behind[1](question="?"), 0, "The step")


def test_an_error_of_the_programs_own_does_not() -> None:
    run(Asking(ValueError("no number"))).check()
