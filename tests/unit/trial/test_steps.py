"""Steps whose claims, or whose storage, are lost at the wrong moment."""

from pathlib import Path
from typing import Any

import dspy
import pytest
from support.sole_claims import OwnSteps, SoleClaims

from bt_ray.errors import InfrastructureError, InfrastructureFailure, StorageError
from bt_ray.models import NoModels
from bt_ray.run_dir.step_store import StepStore
from bt_ray.trial.better_together import StepOutcome
from bt_ray.trial.failure_latch import FailureLatch
from bt_ray.trial.lm import ServedEngine


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


def test_a_step_that_is_kept_is_kept_once_though_reading_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, claims = dspy.Predict("question -> answer"), SoleClaims()
    engine = ServedEngine(NoModels("none"), FailureLatch(), retries=0, timeout_s=1, max_connections=1)
    steps = OwnSteps(tmp_path, "p", program, engine, claims)
    read, failures = StepStore.read_program, [StorageError("The store does not answer.")]
    grants = [True]
    monkeypatch.setattr(claims, "may_commit", lambda key, fence: bool(grants) and grants.pop())

    def failing_once(store: StepStore, name: str) -> Any:
        if failures:
            raise failures.pop()
        return read(store, name)

    monkeypatch.setattr(StepStore, "read_program", failing_once)
    with steps.claim("p") as claim:
        computed = StepOutcome("p", program, 50.0, (1.0, 0.0), 0.0, 1.0)
        with pytest.raises(StorageError):
            claim.commit(computed)
        assert claim.commit(computed).score == 50.0
    assert [outcome.score for outcome in steps.outcomes] == [50.0]
