"""Strategies are read as DSPy reads them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_ray.errors import ConfigError
from bt_ray.strategy import BASELINE, SEPARATOR, all_prefixes, check_distinct, length, parse, prefixes, steps_to_come

KEYS = ["p", "w", "mipro"]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("", "A strategy is empty"),
        ("  ", "A strategy is empty"),
        ("p->w", 'write "p -> w"'),
        ("p ->w", 'write "p -> w"'),
        (" p -> w", 'write "p -> w"'),
        ("p -> ", 'write "p"'),
        ("p -> x", "the task has no optimizer 'x'. Its optimizers: p, w, mipro."),
        ("p -> mirpo", "Did you mean 'mipro'?"),
    ],
)
def test_a_strategy_that_dspy_would_not_read_is_refused_with_the_right_form(strategy: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(strategy, KEYS)
    assert message in str(caught.value)


@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=6))
def test_parsing_undoes_joining_and_prefixes_grow_by_one_step(keys: list[str]) -> None:
    strategy = SEPARATOR.join(keys)
    assert parse(strategy, KEYS) == tuple(keys)
    steps = prefixes(strategy)
    assert [length(step) for step in steps] == list(range(1, len(keys) + 1))
    assert steps[-1] == strategy
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(steps))


@given(st.lists(st.lists(st.sampled_from("pw"), min_size=1, max_size=4).map(SEPARATOR.join), max_size=6))
def test_the_steps_to_come_are_those_of_the_longest_strategy_through_a_step(strategies: list[str]) -> None:
    for step, to_come in steps_to_come([BASELINE, *all_prefixes(strategies)]).items():
        through = [strategy for strategy in strategies if step in [BASELINE, *prefixes(strategy)]]
        assert to_come == max([length(strategy) for strategy in through], default=0) - length(step) + 1


def test_a_strategy_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match='"p" is given twice'):
        check_distinct(["p", "w", "p"])
