"""Where a process that asks for answers runs: on one core while its threads take turns, else on all."""

import os
import threading
from collections.abc import Iterator

import pytest

from bt_ray.one_core import LOOK_S, OneCore, current_core, keep_on

ALL = os.sched_getaffinity(0)
pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="there is one core")


@pytest.fixture(autouse=True)
def all_cores_again() -> Iterator[None]:
    yield
    keep_on(ALL)


class Process:
    """This process, as if it had used its cores at a rate that is set by hand."""

    def __init__(self) -> None:
        self._now = self._used = 0.0
        self._one_core = OneCore(lambda: self._now, lambda: self._used)

    def after(self, rate: float, seconds: float = LOOK_S) -> set[int]:
        """The cores that it may use then."""
        self._now += seconds
        self._used += rate * seconds
        self._one_core.look()
        return os.sched_getaffinity(0)


def test_a_process_whose_threads_take_turns_is_on_one_core_until_it_has_less_to_do() -> None:
    process, seen, wake = Process(), [], threading.Event()
    waiting = threading.Thread(target=lambda: (wake.wait(), seen.append(os.sched_getaffinity(0))))
    waiting.start()
    (core,) = process.after(0.95)
    assert core in ALL
    wake.set()
    waiting.join()
    assert seen == [{core}], "all its threads are"
    assert process.after(1.0) == {core}
    assert process.after(0.5) == ALL, "it has less to do, or others are on that core"
    (_,) = process.after(0.7)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.6])
def test_a_process_that_waits_or_computes_at_once_keeps_all_cores(rate: float) -> None:
    process = Process()
    assert [process.after(rate) for _ in range(3)] == [ALL] * 3


def test_nothing_is_decided_between_two_looks() -> None:
    assert Process().after(0.9, LOOK_S / 2) == ALL


def test_the_current_core_is_the_one_that_is_allowed() -> None:
    keep_on({max(ALL)})
    assert current_core() == max(ALL)
