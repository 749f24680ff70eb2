"""Whose failure it is when a step fails and the claims on steps are lost as well."""

from pathlib import Path
from typing import Any

import dspy
import pytest
from support.sole_claims import OwnSteps, SoleClaims

from bt_ray.errors import InfrastructureError, InfrastructureFailure
from bt_ray.hosting import FailureLatch, NoModels
from bt_ray.lm import ServedEngine


class LostClaims(SoleClaims):
    """Grants claims, and is gone when one ends."""

    def end(self, key: str, fence: int, **how: Any) -> None:
        raise InfrastructureError("the claims are gone")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (InfrastructureFailure("a node is lost"), "a node is lost"),
        (ConnectionError("a node is lost"), "a node is lost"),
        (ValueError("the metric is broken"), "the claims are gone"),
    ],
)
def test_lost_claims_never_make_a_step_the_users_failure(tmp_path: Path, raised: BaseException, said: str) -> None:
    engine = ServedEngine(NoModels("none"), FailureLatch(), retries=0, timeout_s=1, max_connections=1)
    steps = OwnSteps(tmp_path, "p", dspy.Predict("question -> answer"), engine, LostClaims())
    with pytest.raises(InfrastructureFailure, match=said), steps.claim("p"):
        raise raised
