"""A user's metric as DSPy's optimizers call it: a plain function, whose value decides.

A metric may be a coroutine function, or return its score with feedback as GEPA wants it. DSPy would take a coroutine, and a
`dspy.Prediction` whatever its score, for a success. A score that is no finite number is an error of its example: DSPy would
take NaN for a success where it filters examples, and one NaN or infinity would be the score of all examples together.
"""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import dspy
from dspy.teleprompt import BootstrapFewShot, BootstrapFewShotWithRandomSearch, BootstrapFinetune, MIPROv2
from dspy.teleprompt.teleprompt import Teleprompter

Metric = Callable[..., Any]
ATTRIBUTES = ("metric", "metric_fn")
"""Where DSPy's optimizers keep their metric."""
FILTER_BY_METRIC = (BootstrapFewShot, BootstrapFewShotWithRandomSearch, MIPROv2, BootstrapFinetune)
"""Optimizers that keep the examples for which the metric's value is true."""


def make_synchronous(metric: Metric) -> Metric:
    """`metric` as a plain function: a coroutine function is awaited in an event loop of the calling thread's own."""
    if not is_async(metric):
        return metric

    @functools.wraps(metric)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return asyncio.run(metric(*args, **kwargs))

    return plain


def is_async(metric: Any) -> bool:
    return inspect.iscoroutinefunction(metric) or inspect.iscoroutinefunction(getattr(metric, "__call__", None))  # noqa: B004


def refuse_non_finite(metric: Metric) -> Metric:
    """`metric`, raising `ValueError` where its score is NaN or infinite."""

    @functools.wraps(metric, updated=())
    def finite(*args: Any, **kwargs: Any) -> Any:
        value = metric(*args, **kwargs)
        if not is_finite(value):
            raise ValueError(f"the metric gave {_show_value(value)}, which is no score")
        return value

    return finite


def is_finite(value: Any) -> bool:
    """Whether a score, which may stand in a `dspy.Prediction`, is not NaN or infinite. What is no number is left to DSPy."""
    try:
        return isinstance(value, str) or math.isfinite(float(value))
    except OverflowError:
        return False
    except Exception:  # an object of the user's may raise anything
        return True


def _show_value(value: Any) -> str:
    return str(value.score if isinstance(value, dspy.Prediction) else value)[:80]


def adapt_metric(optimizer: Teleprompter) -> None:
    """Have an optimizer await its metric, filter examples by its score, and refuse scores that are not finite."""
    for name in ATTRIBUTES:
        metric = getattr(optimizer, name, None)
        if callable(metric):
            plain = refuse_non_finite(make_synchronous(metric))
            setattr(optimizer, name, _score_alone(plain) if isinstance(optimizer, FILTER_BY_METRIC) else plain)


def _score_alone(metric: Metric) -> Metric:
    @functools.wraps(metric)
    def score(*args: Any, **kwargs: Any) -> Any:
        value = metric(*args, **kwargs)
        return value.score if isinstance(value, dspy.Prediction) else value

    return score
