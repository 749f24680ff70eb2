"""Intervals and tests against scipy's and statsmodels's, and how often equal programs are taken for different ones."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from bt_ray.report.comparison import compare, correct_p_values, interval, p_value, verdict
from bt_ray.report.table import summary_lines
from bt_ray.run_dir.results import Candidate, SweepResult, TrialResult

RANDOM = np.random.default_rng(7)


def right_or_wrong(share: float, examples: int) -> list[float]:
    return (RANDOM.random(examples) < share).astype(float).tolist()


@pytest.mark.parametrize("scores", [right_or_wrong(0.7, 50), right_or_wrong(0.95, 200), RANDOM.random(30).tolist()])
def test_the_interval_is_scipys(scores: list[float]) -> None:
    ours = interval(scores)
    theirs = bootstrap((scores,), np.mean, method="percentile", n_resamples=50_000, rng=1).confidence_interval
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1.0)


def test_scores_that_are_all_alike_have_no_interval() -> None:
    assert interval([1.0]) is None
    assert interval([1.0] * 50) is None


@pytest.mark.parametrize("examples", [12, 200])
def test_of_right_and_wrong_the_p_value_is_mcnemars(examples: int) -> None:
    one, other = np.array(right_or_wrong(0.8, examples)), np.array(right_or_wrong(0.6, examples))
    table = [[int(((one == a) & (other == b)).sum()) for b in (1, 0)] for a in (1, 0)]
    assert p_value((one - other).tolist()) == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_of_graded_scores_the_p_value_is_scipys() -> None:
    for _ in range(5):
        differences = RANDOM.normal(0.3, 1.0, 14)
        exact = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert p_value(differences.tolist()) == pytest.approx(exact, abs=0.015)


def test_programs_that_answer_alike_have_nothing_between_them() -> None:
    assert p_value([0.0] * 20) == 1.0


@settings(max_examples=25)  # statsmodels takes its time
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_correction_is_holms(p_values: list[float]) -> None:
    assert correct_p_values(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_a_winner_that_the_examples_chose_must_be_further_ahead() -> None:
    winner, others = [1.0] * 30, {"second": [1.0] * 20 + [0.0] * 10, "third": [1.0] * 22 + [0.0] * 8}
    fresh, chosen = (compare(winner, others, picked_from=programs) for programs in (None, 3))
    assert (fresh["second"].difference, fresh["second"].wins, fresh["second"].losses) == (pytest.approx(100 / 3), 10, 0)
    for name in others:
        assert chosen[name].p_value == pytest.approx(1.5 * fresh[name].p_value), "three pairs in place of two"


def sweep_of(programs: list[tuple[list[float], list[float]]], steps: int = 1) -> SweepResult:
    """A finished sweep, of programs with these scores on valset and testset; the first strategy has so many steps."""
    candidates = []
    for number, (val, test) in enumerate(programs):
        score, test_score = 100 * float(np.mean(val)), 100 * float(np.mean(test)) if test else None
        named = (f"s{number}", score, tuple(val), 0.0, 1.0, {}, f"steps/{number}")
        candidates.append(Candidate(named[0], *named, test_score=test_score, test_example_scores=tuple(test)))
    trials = [tuple(candidates[:steps]), *((candidate,) for candidate in candidates[steps:])]
    return SweepResult("runs/x", tuple(TrialResult(trial[0].strategy, trial) for trial in trials), 1.0)


@pytest.mark.parametrize(("tested", "steps"), [(True, 1), (False, 1), (False, 7)], ids=["testset", "valset", "many steps"])
def test_equal_programs_are_rarely_taken_for_different_ones(tested: bool, steps: int) -> None:
    sweeps, claims = 2_000, 0
    for _ in range(sweeps):
        programs = [(right_or_wrong(0.6, 60), right_or_wrong(0.6, 60) if tested else []) for _ in range(8)]
        found = verdict(sweep_of(programs, steps))
        assert found is not None
        assert found.on_testset == tested
        claims += "is better than" in found.sentence
    _, upper = proportion_confint(claims, sweeps, method="beta")
    assert claims / sweeps <= 0.05
    assert upper <= 0.06


def test_a_clear_winner_is_told_from_the_others() -> None:
    good, bad = [1.0] * 50, [0.0] * 25 + [1.0] * 25
    found = verdict(sweep_of([(bad, []), (good, []), (bad, [])]))
    assert found is not None
    assert found.winner.strategy == "s1"
    assert found.sentence.startswith('The winner is better than the runner-up, "s0": it does better on 25 of 50 validation')


def test_a_winner_by_luck_is_told_from_no_other() -> None:
    found = verdict(sweep_of([([1.0] * 31 + [0.0] * 19, [1.0] * 10 + [0.0] * 10), ([0.0] * 20 + [1.0] * 30, [1.0] * 20)]))
    assert found is not None
    assert (
        "is better than the winner on examples that chose neither: it does better on 0 of 20 test examples" in found.sentence
    )
    even = verdict(sweep_of([([1.0] * 31 + [0.0] * 19, []), ([0.0] * 20 + [1.0] * 30, [])]))
    assert even is not None
    assert even.sentence.startswith("The winner cannot be told from the runner-up")


def on_examples(result: SweepResult, *names: str, on_testset: bool = False) -> SweepResult:
    """The sweep, whose trials were scored on the valsets, or the testsets, of these names."""
    trials = []
    for trial, name in zip(result.trials, names, strict=True):
        named = {"testset" if on_testset else "valset": name}
        trials.append(replace(trial, candidates=tuple(replace(c, **named) for c in trial.candidates)))
    return replace(result, trials=tuple(trials))


@pytest.mark.parametrize("on_testset", [False, True])
def test_programs_are_compared_where_they_answered_the_same_examples_alone(on_testset: bool) -> None:
    good, bad = [1.0] * 50, [0.0] * 25 + [1.0] * 25
    result = sweep_of([(good, good if on_testset else []), (bad, bad if on_testset else [])])
    found = verdict(on_examples(result, "easy", "hard", on_testset=on_testset))
    assert found is not None
    assert (found.others, found.incomparable) == ((), 1)
    how = "tested" if on_testset else "validated"
    assert found.sentence == f"The winner cannot be compared with 1 other program, which was {how} on other examples."
    alike = verdict(on_examples(result, "hard", "hard", on_testset=on_testset))
    assert alike is not None
    assert alike.sentence.startswith("The winner is better than the runner-up")


def test_a_ranking_over_different_valsets_is_told() -> None:
    result = sweep_of([([1.0] * 20, []), ([1.0] * 10 + [0.0] * 10, []), ([1.0] * 20 + [0.0] * 10, [])])
    mixed = on_examples(result, "easy", "easy", "hard")
    lines = summary_lines(mixed)
    assert lines[1].startswith("The ranking is over 2 different valsets")
    assert 'The winner is better than the runner-up, "s1": it does better on 10 of 20' in lines[2]
    assert lines[2].endswith("The winner cannot be compared with 1 other program, which was validated on other examples.")
    assert not [line for line in summary_lines(on_examples(result, *["one"] * 3)) if "valsets" in line]


def test_one_program_is_compared_with_nothing() -> None:
    assert verdict(sweep_of([([1.0], [])])) is None
    assert verdict(SweepResult("runs/x", (), 1.0)) is None
