"""The canary tells weights from others, and the same weights from nothing else."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_ray.serving.canary import CONFIDENT, FIXED_SEQUENCES, TOLERANCE, Canary, changed, difference, make_canary

rows = st.lists(st.floats(-5, 0), min_size=9, max_size=9)


def canary(said: list[float], parents: list[float]) -> Canary:
    return make_canary([list(range(10))], [4], [said], [parents])


@given(rows, rows)
def test_weights_pass_their_own_canary_and_a_canary_that_says_it_discriminates_fails_their_parent(
    said: list[float], parents: list[float]
) -> None:
    made = canary(said, parents)
    assert difference(made, [said]) is None
    if made.discriminating:
        assert difference(made, [parents]) is not None
    assert Canary.from_json(made.to_json()) == made


@given(rows, st.floats(-0.2, 0.2))
def test_noise_within_the_tolerance_passes_and_more_does_not(said: list[float], noise: float) -> None:
    said[5] = -0.1
    made = canary(said, said)
    assert not made.discriminating, "equal weights cannot be told apart"
    noisy = [value + noise for value in said]
    assert difference(made, [noisy]) is None
    noisy[5] = said[5] + 2 * TOLERANCE
    assert "token 6 of sequence 0" in (difference(made, [noisy]) or "")


def test_only_likely_tokens_of_the_completion_are_compared() -> None:
    made = canary([-0.1, -0.1, -0.1, -0.1, CONFIDENT - 0.1, -0.1, -3.0, CONFIDENT, 0.0], [-9.0] * 9)
    assert made.positions == ((4, 6, 8, 9),)
    assert difference(made, [[-9, -9, -9, -0.1, -9, -0.1, -9, CONFIDENT, 0.0]]) is None


def test_no_number_is_no_agreement() -> None:
    made = canary([-0.1] * 9, [-9.0] * 9)
    assert difference(made, [[math.nan] * 9]) is not None
    assert changed([[-0.1]], [[math.nan]], "cpu: any") is not None


@pytest.mark.parametrize(("platform", "allowed"), [("cpu: any", 0.0), ("gpu: any", 0.019)])
def test_an_engine_must_answer_as_it_did_before(platform: str, allowed: float) -> None:
    assert changed([[-1.0, -2.0]], [[-1.0, -2.0 + allowed]], platform) is None
    assert "token 2 of sequence 0" in (changed([[-1.0, -2.0]], [[-1.0, -2.03]], platform) or "")


def test_the_fixed_sequences_differ_and_fit_small_vocabularies() -> None:
    assert len(set(FIXED_SEQUENCES)) == 4
    assert all(0 < token < 200 for tokens in FIXED_SEQUENCES for token in tokens)
