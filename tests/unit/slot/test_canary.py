"""The canary tells weights from others, and the same weights from nothing else."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_ray.slot.canary import (
    CONFIDENT,
    FIXED_SEQUENCES,
    TOLERANCE,
    TOLERANCE_FLOAT32,
    Canary,
    describe_change,
    difference,
    make_canary,
)

rows = st.lists(st.floats(-5, 0), min_size=9, max_size=9)


def canary(said: list[float], parents: list[float], dtype: str = "bfloat16") -> Canary:
    return make_canary([list(range(10))], [4], [said], [parents], dtype)


dtypes = st.sampled_from(["float32", "bfloat16"])


@given(rows, rows, dtypes, dtypes)
def test_weights_pass_their_own_canary_and_a_canary_that_says_it_tells_them_apart_fails_their_parent(
    said: list[float], parents: list[float], trainers: str, servers: str
) -> None:
    made = canary(said, parents, trainers)
    tolerance = made.tolerance(servers)
    assert difference(made, [said], tolerance) is None
    if made.tells_from_parent(tolerance):
        assert difference(made, [parents], tolerance) is not None
    assert Canary.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("trainers", "servers", "tolerance"),
    [
        ("float32", "float32", TOLERANCE_FLOAT32),
        ("float32", "bfloat16", TOLERANCE),
        ("bfloat16", "float32", TOLERANCE),
        ("bfloat16", "bfloat16", TOLERANCE),
        ("float32", None, TOLERANCE),
    ],
)
def test_where_both_compute_in_float32_less_is_allowed_so_that_smaller_changes_are_told(
    trainers: str, servers: str | None, tolerance: float
) -> None:
    made = canary([-0.1] * 9, [-0.2] * 9, trainers)
    assert made.tolerance(servers) == tolerance
    assert made.tells_from_parent(made.tolerance(servers)) == (tolerance == TOLERANCE_FLOAT32)


@pytest.mark.parametrize("discriminating", [True, False])
def test_a_canary_of_before_is_read(discriminating: bool) -> None:
    values = canary([-0.1] * 9, [-9.0] * 9).to_json()
    del values["margin"], values["dtype"]
    read = Canary.from_json({**values, "discriminating": discriminating})
    assert read.tells_from_parent(read.tolerance("float32")) == discriminating


@given(rows, st.floats(-0.2, 0.2))
def test_noise_within_the_tolerance_passes_and_more_does_not(said: list[float], noise: float) -> None:
    said[5] = -0.1
    made = canary(said, said)
    assert not made.tells_from_parent(TOLERANCE_FLOAT32), "equal weights cannot be told apart"
    noisy = [value + noise for value in said]
    assert difference(made, [noisy], TOLERANCE) is None
    noisy[5] = said[5] + 2 * TOLERANCE
    assert "token 6 of sequence 0" in (difference(made, [noisy], TOLERANCE) or "")


def test_only_likely_tokens_of_the_completion_are_compared() -> None:
    made = canary([-0.1, -0.1, -0.1, -0.1, CONFIDENT - 0.1, -0.1, -3.0, CONFIDENT, 0.0], [-9.0] * 9)
    assert made.positions == ((4, 6, 8, 9),)
    assert difference(made, [[-9, -9, -9, -0.1, -9, -0.1, -9, CONFIDENT, 0.0]], TOLERANCE) is None


def test_no_number_is_no_agreement() -> None:
    made = canary([-0.1] * 9, [-9.0] * 9)
    assert difference(made, [[math.nan] * 9], TOLERANCE) is not None
    assert describe_change([[-0.1]], [[math.nan]], "cpu: any") is not None


@pytest.mark.parametrize(("platform", "allowed"), [("cpu: any", 0.0), ("gpu: any", 0.019)])
def test_an_engine_must_answer_as_it_did_before(platform: str, allowed: float) -> None:
    assert describe_change([[-1.0, -2.0]], [[-1.0, -2.0 + allowed]], platform) is None
    assert "token 2 of sequence 0" in (describe_change([[-1.0, -2.0]], [[-1.0, -2.03]], platform) or "")


def test_the_fixed_sequences_differ_and_fit_small_vocabularies() -> None:
    assert len(set(FIXED_SEQUENCES)) == 4
    assert all(0 < token < 200 for tokens in FIXED_SEQUENCES for token in tokens)
