"""Suggestions and the exception tree."""

from bt_ray.errors import (
    BtRayError,
    InfrastructureError,
    InfrastructureFailure,
    ServerError,
    TaskError,
    TrainingError,
    nearest,
)


def test_the_nearest_word_is_suggested_and_nothing_for_a_stranger() -> None:
    assert nearest("stratgies", ["strategies", "seed"]) == " Did you mean 'strategies'?"
    assert nearest("xyz", ["strategies", "seed"]) == ""


def test_what_dspy_must_not_swallow_is_no_exception() -> None:
    assert not issubclass(InfrastructureFailure, Exception)
    assert issubclass(ServerError, InfrastructureError)
    assert issubclass(TrainingError, InfrastructureError)
    assert not issubclass(TaskError, InfrastructureError)
    assert issubclass(TaskError, BtRayError)
