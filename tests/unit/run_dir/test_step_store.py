"""The step store: what counts as finished, and which of several attempts."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.made_sweep import STEP
from support.object_store import ObjectStore

from bt_ray.run_dir.step_store import StepStore
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.strategy import all_prefixes, every, parent, prefixes, start_order


@pytest.fixture
def store(storage: Storage) -> StepStore:
    return StepStore(storage)


def commit(store: StepStore, fence: int, score: float) -> None:
    attempt = f"{fence:012d}-abc"
    program = store.write_program("k", attempt, b'{"demos": []}')
    store.commit(replace(STEP, score=score, program=program), attempt)


def test_a_committed_step_is_read_as_it_was(store: StepStore) -> None:
    commit(store, 7, 50.0)
    assert store.read("k") == replace(STEP, program="steps/k/000000000007-abc/program.json")
    assert store.find_finished({"p": "k", "w": "other"}, {"base"}).keys() == {"p"}


def test_an_attempt_counts_only_with_its_manifest(store: StepStore) -> None:
    store.write_program("k", "1", b"{}")
    assert store.read("k") is None


@pytest.mark.parametrize("order", [(8, 9), (9, 8)])
def test_of_two_attempts_the_later_claim_counts(store: StepStore, order: tuple[int, int]) -> None:
    for fence in order:
        commit(store, fence, float(fence))
    found = store.read("k")
    assert found is not None
    assert found.score == 9.0


def test_what_is_finished_costs_an_object_store_one_list_and_two_reads_for_each_step(
    s3: ObjectStore, tmp_path: Path
) -> None:
    store = StepStore(open_storage(f"s3://bucket/{tmp_path.name}"))
    for number in range(20):
        attempt, key = f"{number:012d}-abc", f"key{number}"
        program = store.write_program(key, attempt, b"{}")
        store.commit(replace(STEP, key=key, program=program), attempt)
    before = len(s3.requests(tmp_path.name))
    assert len(store.find_finished({f"p{number}": f"key{number}" for number in range(1000)}, {"base"})) == 20
    asked = s3.requests(tmp_path.name)[before:]
    assert len(asked) <= 1 + 4 * 20, asked


def test_a_step_without_its_weights_is_not_finished(store: StepStore) -> None:
    program = store.write_program("k", "1", b"{}")
    store.commit(replace(STEP, program=program, weights={"self": "base-ft-1"}), "1")
    assert store.find_finished({"p": "k"}, {"base"}) == {}
    store.storage.write_json("weights/base-ft-1/bt_ray_weights.json", {"id": "base-ft-1", "parent": "base"})
    assert store.find_finished({"p": "k"}, {"base"}).keys() == {"p"}


STRATEGIES = st.lists(st.lists(st.sampled_from("pwx"), min_size=1, max_size=4).map(" -> ".join), min_size=1, unique=True)


@given(STRATEGIES)
def test_every_step_comes_once_and_after_its_parent(strategies: list[str]) -> None:
    steps = all_prefixes(strategies)
    assert len(set(steps)) == len(steps)
    assert set(steps) == {prefix for strategy in strategies for prefix in prefixes(strategy)}
    for position, step in enumerate(steps):
        assert parent(step) == "" or parent(step) in steps[:position]


@given(STRATEGIES, st.data())
def test_trials_start_with_the_most_different_steps_under_way(strategies: list[str], data: st.DataObject) -> None:
    finished = data.draw(st.sets(st.sampled_from(all_prefixes(strategies))))
    order = start_order({strategy: prefixes(strategy) for strategy in strategies}, finished, ())
    assert sorted(order) == sorted(strategies)
    firsts = [next((p for p in prefixes(s) if p not in finished), None) for s in order]
    different = {first for first in firsts if first}
    assert set(firsts[: len(different)]) == different, "no two start with the same step while others are not started"
    taken: set[str] = set()
    for number, chosen in enumerate(order):
        todo = {s: [p for p in prefixes(s) if p not in finished] for s in order[number:]}
        shared = {s: next((n for n, p in enumerate(left) if p not in taken), len(left)) for s, left in todo.items() if left}
        if chosen in shared:
            assert shared[chosen] == min(shared.values()), "no other leaves the paths that were taken any earlier"
            assert all(len(todo[s]) <= len(todo[chosen]) for s in shared if shared[s] == shared[chosen])
        taken.update(todo[chosen])


def test_of_trials_that_are_alike_one_with_more_trainings_starts_first() -> None:
    strategies = every("pw", 2)
    paths = {strategy: prefixes(strategy) for strategy in strategies}
    order = start_order(paths, (), {step for step in all_prefixes(strategies) if step.endswith("w")})
    assert order == ["w -> w", "p -> w", "w -> p", "p -> p", "w", "p"]


def test_ten_thousand_trials_are_ordered_at_once() -> None:
    strategies = every("pwx", 8)
    order = start_order({strategy: prefixes(strategy) for strategy in strategies}, (), ())
    assert len(order) == len(strategies) == 9840
    assert len({prefixes(strategy)[1] for strategy in order[:9]}) == 9, "all pairs are under way with the first nine trials"
