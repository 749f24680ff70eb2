"""How many threads a training on CPU computes with."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bt_ray.training import cores
from bt_ray.training.cores import threads_for, usable_cores


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


@pytest.mark.parametrize(("quota", "allowed"), [("max 100000", 99), ("50000 100000", 1), ("250000 100000", 2)])
def test_a_containers_limit_counts(quota: str, allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(99)), raising=False)
    assert usable_cores() == allowed
