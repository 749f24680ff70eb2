"""The search over strategies: laws of what it suggests, and how far it gets where the best strategy is known."""

import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_ray.driver.search_model import StrategySearch
from bt_ray.strategy import every, prefixes

sys.path.insert(0, str(ROOT / "scripts"))

from search_landscapes import FAMILIES, chosen_at_random, draw, regret, searched

OPTIMIZERS, LENGTH = ("p", "w"), 3
STEPS = every(OPTIMIZERS, LENGTH)
SCORES = st.floats(-50, 150)


@settings(max_examples=40)
@given(
    scores=st.dictionaries(st.sampled_from(["", *STEPS]), SCORES, max_size=10),
    failed=st.sets(st.sampled_from(STEPS), max_size=2),
    under_way=st.sets(st.sampled_from(STEPS), max_size=3),
    steps_left=st.none() | st.integers(1, 4),
)
def test_what_is_suggested_is_new_possible_and_affordable(
    scores: dict[str, float], failed: set[str], under_way: set[str], steps_left: int | None
) -> None:
    def suggested() -> str | None:
        search = StrategySearch(OPTIMIZERS, LENGTH, seed=1)
        for prefix, score in scores.items():
            search.observe(prefix, score)
        for prefix in failed:
            search.note_failed(prefix)
        return search.suggest(under_way, steps_left)

    promised = {step for strategy in under_way for step in prefixes(strategy)}
    computed = promised | scores.keys()

    def allowed(strategy: str) -> bool:
        new = [step for step in prefixes(strategy) if step not in computed]
        affordable = steps_left is None or len(new) <= steps_left
        return strategy not in computed and not failed & set(prefixes(strategy)) and affordable

    strategy = suggested()
    assert strategy == suggested(), "the same calls give the same answer"
    assert (strategy is None) == (not any(map(allowed, STEPS))), "it ends when nothing is left, and not before"
    assert strategy is None or allowed(strategy)


def test_trials_at_a_time_go_different_ways() -> None:
    search = StrategySearch(OPTIMIZERS, LENGTH)
    search.observe("", 20.0)
    under_way: list[str] = []
    while (strategy := search.suggest(under_way)) is not None:
        under_way.append(strategy)
    assert len(set(under_way)) == len(under_way)
    assert {step for strategy in under_way for step in prefixes(strategy)} == set(STEPS)


def test_what_was_observed_is_believed_more_and_its_neighbours_with_it() -> None:
    search = StrategySearch(OPTIMIZERS, LENGTH)
    search.observe("", 20.0)
    _, doubt = search.expect("p")
    for prefix, score in {"p": 40.0, "p -> p": 45.0, "w": 10.0, "w -> w": 8.0}.items():
        search.observe(prefix, score)
    mean, sure = search.expect("p")
    assert mean == pytest.approx(40, abs=4)
    assert sure < doubt / 2
    assert search.expect("p -> p -> p")[0] > search.expect("w -> w -> w")[0] + 10
    assert search.best() in ("p", "p -> p")
    assert (search.suggest() or "").startswith("p -> ")


def test_a_lucky_score_counts_for_less_than_what_its_neighbours_support() -> None:
    search = StrategySearch(OPTIMIZERS, LENGTH)
    supported = {"p": 60.0, "p -> w": 60.0, "p -> p": 60.0, "p -> w -> w": 60.0, "p -> w -> p": 60.0}
    lucky = {"w": 30.0, "w -> w": 62.0, "w -> w -> w": 30.0, "w -> w -> p": 30.0}
    for prefix, score in {"": 30.0, **supported, **lucky}.items():
        search.observe(prefix, score)
    assert search.best() in supported


def test_scores_that_are_all_alike_are_no_reason_to_stop() -> None:
    search = StrategySearch(OPTIMIZERS, 2)
    walked = []
    while (strategy := search.suggest()) is not None:
        walked.append(strategy)
        for prefix in prefixes(strategy):
            search.observe(prefix, 0.0)
    assert {step for strategy in walked for step in prefixes(strategy)} == set(every(OPTIMIZERS, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_gets_further_than_random_choice(family: str) -> None:
    """On ten landscapes that nothing was tuned on. `scripts/search_landscapes.py` prints more of them."""
    landscapes = [(draw(family, seed, sigma=2.0), seed) for seed in range(1000, 1010)]
    found = sorted(regret(true, searched(observed, seed)) for (true, observed), seed in landscapes)
    at_random = [regret(true, chosen_at_random(observed, seed)) for (true, observed), seed in landscapes]
    assert sum(found) <= sum(at_random)
    assert found[6] <= 2.0, "most of them within the noise"
