"""Where a process runs: on one core while its threads take turns by Python's lock, else on all."""

import os
import subprocess
import sys
import threading

import pytest
from support.processes import wait_for

from bt_ray.trial.one_core import LOOK_S, RECONSIDER_S, Decision, find_running_core, keep_on, one_core

ALL = os.sched_getaffinity(0)
several_cores = pytest.mark.skipif(len(ALL) < 2, reason="there is one core")


def decisions(*rates: float) -> list[bool]:
    """What is decided of a process that uses its cores at these rates, from look to look."""
    decision, now, used, decided = Decision(), 0.0, 0.0, []
    for rate in rates:
        now, used = now + LOOK_S, used + rate * LOOK_S
        decision.on_one = decision.after(now, used)
        decided.append(decision.on_one)
    return decided


def test_a_process_whose_threads_take_turns_is_on_one_core_until_it_has_less_to_do() -> None:
    assert decisions(0.95, 1.0, 0.7, 0.5, 0.3, 0.7) == [True, True, True, False, False, True]


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.6])
def test_a_process_that_waits_or_computes_at_once_keeps_all_cores(rate: float) -> None:
    assert decisions(*[rate] * 3) == [False] * 3


def test_on_one_core_it_is_looked_now_and_then_at_what_it_does_with_all() -> None:
    looks = int(RECONSIDER_S / LOOK_S)
    assert decisions(*[1.0] * (looks + 2)) == [True] * looks + [False, True]
    assert decisions(*[1.0] * (looks + 1), 1.8, 1.8)[-3:] == [False] * 3


@several_cores
def test_all_threads_are_kept_on_one_core_and_what_they_start_is_on_all() -> None:
    seen: dict[str, set[int]] = {}
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set() and len(os.sched_getaffinity(0)) > 1:
            sum(range(10_000))
        seen["thread"] = os.sched_getaffinity(0)
        code = "import os; print(sorted(os.sched_getaffinity(0)))"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        seen["child"] = set(map(int, said.strip()[1:-1].split(",")))

    with one_core():
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join(60)
        stop.set()
        thread.join()
    assert len(seen["thread"]) == 1
    assert seen["child"] == ALL
    assert os.sched_getaffinity(0) == ALL, "afterwards"


@several_cores
def test_the_core_is_one_on_which_a_thread_computes() -> None:
    stop = threading.Event()

    def compute() -> None:
        os.sched_setaffinity(0, {max(ALL)})
        while not stop.is_set():
            sum(range(10_000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        wait_for("the thread to be seen", lambda: find_running_core() == max(ALL))
    finally:
        stop.set()
        thread.join()
        keep_on(ALL)
