"""Ranking: the higher score, then the fewer steps, then the order given."""

from hypothesis import given
from hypothesis import strategies as st

from bt_ray.run_dir.results import Candidate, SweepResult, TrialResult
from bt_ray.strategy import length, prefixes


def candidate(strategy: str, prefix: str, score: float | None) -> Candidate:
    return Candidate(strategy, prefix, score, (), 0.0, 1.0, {}, "program.json")


def trial(strategy: str, scores: list[float | None]) -> TrialResult:
    steps = ["", *prefixes(strategy)]
    return TrialResult(strategy, tuple(candidate(strategy, step, score) for step, score in zip(steps, scores, strict=True)))


SCORES = st.sampled_from([0.0, 10.0, 20.0])
TRIALS = st.lists(
    st.sampled_from(["p", "p -> w", "w -> p", "p -> w -> p"]).flatmap(
        lambda strategy: st.lists(SCORES, min_size=length(strategy) + 1, max_size=length(strategy) + 1).map(
            lambda scores: trial(strategy, scores)
        )
    ),
    min_size=1,
    max_size=4,
)


@given(TRIALS)
def test_the_best_has_the_top_score_with_the_fewest_steps_first_in_order(trials: list[TrialResult]) -> None:
    result = SweepResult("run", tuple(trials), 1.0)
    best = result.best
    assert best is not None
    everyone = [c for t in trials for c in t.candidates]
    top = [c for c in everyone if c.score == max(c.score or 0 for c in everyone)]
    fewest = min(length(c.prefix) for c in top)
    assert best == next(c for c in top if length(c.prefix) == fewest)
    assert [c.rank_key for c in result.candidates] == sorted(c.rank_key for c in everyone)


@given(TRIALS)
def test_a_trial_survives_json(trials: list[TrialResult]) -> None:
    for one in trials:
        assert TrialResult.from_json(one.to_json()) == one


def test_without_scores_the_latest_program_is_the_best() -> None:
    result = SweepResult("run", (trial("p -> w", [None, None, None]),), 1.0)
    assert result.best is not None
    assert result.best.prefix == "p -> w"
