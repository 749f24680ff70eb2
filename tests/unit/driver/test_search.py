"""A search within its budget, whatever order its trials' reports come in."""

from hypothesis import given, settings
from hypothesis import strategies as st

from bt_ray.driver.search import SearchWalk
from bt_ray.settings.config import StrategySearch
from bt_ray.strategy import prefixes


def walk(budget: str) -> SearchWalk:
    return SearchWalk(StrategySearch(max_length=3, budget=budget), ["p", "w"], {}, gpus=1, seed=0)


@settings(max_examples=50)
@given(st.data(), st.integers(1, 8), st.integers(1, 4))
def test_no_more_steps_are_computed_than_the_budget_has(data: st.DataObject, budget: int, trials: int) -> None:
    """A trial that loads a step may report it before the one that computed it does."""
    searched = walk(f"{budget} steps")
    reports: dict[str, list[tuple[str, bool]]] = {}
    computed: set[str] = set()
    while True:
        while len(reports) < trials and (strategy := searched.next()) is not None:
            reports[strategy] = [(prefix, prefix in computed) for prefix in prefixes(strategy)]
            computed.update(prefixes(strategy))
        if not reports:
            break
        strategy = data.draw(st.sampled_from(sorted(reports)))
        if reports[strategy]:
            prefix, loaded = reports[strategy].pop(0)
            searched.note_finished(prefix, 50.0, 1.0, 10, loaded=loaded)
        else:
            del reports[strategy]
            searched.note_ended(strategy)
    assert len(computed) == min(budget, 14)
    assert searched.is_over
