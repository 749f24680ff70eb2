"""How many threads a training on CPU computes with."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_ray.slot.training import cores
from bt_ray.slot.training.cores import find_allowed_cores, has_quota, threads_for


def test_a_training_takes_an_idle_core_and_gives_it_back_when_somebody_wants_it() -> None:
    assert threads_for(1, 1, 2, used=1.0, idle=0.95) == 2
    assert threads_for(2, 1, 2, used=1.9, idle=0.1) == 2
    assert threads_for(2, 1, 2, used=1.5, idle=0.5) == 2, "what it does not use, nobody else does"
    assert threads_for(2, 1, 2, used=1.3, idle=0.0) == 1
    assert threads_for(1, 1, 2, used=0.6, idle=0.0) == 1
    assert threads_for(1, 1, 2, used=1.0, idle=0.5) == 1, "half a core is none"
    assert threads_for(2, 2, 16, used=2.0, idle=5.9) == 8


@given(st.integers(1, 16), st.integers(1, 8), st.integers(0, 8), st.floats(0, 16), st.floats(0, 64))
def test_it_has_its_own_threads_in_any_case_and_never_more_than_the_most(
    threads: int, own: int, more: int, used: float, idle: float
) -> None:
    most = own + more
    threads = min(max(threads, own), most)
    assert own <= threads_for(threads, own, most, used=used, idle=idle) <= most


@pytest.mark.parametrize(
    ("limit", "limited"), [("max 100000", False), ("-1", False), ("250000 100000", True), ("50000", True)]
)
def test_a_container_with_a_limit_is_known(
    limit: str, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text(f"{limit}\n")
    monkeypatch.setattr(cores, "QUOTAS", (tmp_path / "limit", tmp_path / "missing"))
    assert has_quota() == limited


def test_idle_cores_are_read_of_those_that_are_allowed() -> None:
    everything, nothing = cores._read_times(find_allowed_cores()), cores._read_times([])
    assert everything[2] > 0
    assert nothing[2] == 0
