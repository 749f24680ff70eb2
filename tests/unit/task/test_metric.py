"""Scores that are no numbers: errors of their examples, wherever DSPy meets them."""

import math
from typing import Any

import dspy
import numpy as np
import pytest
from dspy.teleprompt import BootstrapFewShot, LabeledFewShot
from dspy.utils.dummies import DummyLM
from support import known

from bt_ray.errors import TaskError
from bt_ray.task.metric import adapt_metric, is_finite, refuse_non_finite
from bt_ray.trial.evaluation import Limits, LocalEvaluator
from bt_ray.trial.failure_latch import FailureLatch

NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), dspy.Prediction(score=math.nan, feedback="?"), 10**400]


@pytest.mark.parametrize("value", NOT_FINITE, ids=repr)
def test_an_example_without_a_score_counts_as_failed_and_the_others_keep_theirs(value: Any) -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> Any:
        return value if example.question == "number 1" else known.exact(example, prediction)

    evaluator = LocalEvaluator(metric, FailureLatch())
    scores = evaluator.scores(known.Known(skill=2), known.examples(range(20)), Limits(num_threads=2))
    assert scores.of_examples == (1.0, 0.0, *[0.0] * 8, 1.0, 1.0, *[0.0] * 8)
    assert scores.percent == 15.0
    (error,) = scores.errors
    assert error.startswith("ValueError: the metric gave ")
    assert error.endswith(", which is no score")


def test_as_many_as_max_errors_end_the_evaluation() -> None:
    evaluator = LocalEvaluator(lambda *of: math.nan, FailureLatch())
    with pytest.raises(TaskError, match="stopped after 3 failed examples"):
        evaluator.scores(known.Known(), known.examples(range(20)), Limits(num_threads=1, max_errors=3))


def test_scores_that_are_too_large_for_a_mean_end_it_too() -> None:
    evaluator = LocalEvaluator(lambda *of: 1e308, FailureLatch())
    with pytest.raises(TaskError, match="too large to add up; the largest is 1e"):
        evaluator.scores(known.Known(), known.examples(range(20)), Limits(num_threads=1))


def test_an_optimizer_keeps_no_example_whose_score_is_none() -> None:
    optimizer = BootstrapFewShot(metric=lambda *of: math.nan, max_labeled_demos=0)
    lm, examples = DummyLM([{"answer": "0"}] * 40), known.examples(range(4))
    with dspy.context(lm=lm):
        taken = optimizer.compile(dspy.Predict(known.Double), trainset=examples)
        assert len(taken.demos) == 4, "DSPy alone: NaN is true"
        adapt_metric(optimizer)
        assert optimizer.compile(dspy.Predict(known.Double), trainset=examples).demos == []
    adapt_metric(LabeledFewShot())


def test_what_is_a_score_or_no_number_at_all_is_left_to_dspy() -> None:
    scores = [True, 0, 0.5, np.float64(0.5), dspy.Prediction(score=1.0), dspy.Prediction(answer="a"), None, "nan", object()]
    assert all(map(is_finite, scores))
    assert [refuse_non_finite(lambda value: value)(score) for score in scores] == scores
