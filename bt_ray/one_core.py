"""Keeps a process on one core while Python's global interpreter lock is what bounds it.

Threads that hand the lock to each other across cores take twice the CPU time for a request that they take on one core, so a
process on one core asks twice as fast (`scripts/bench_requests.py`). It holds for Python's own work alone: a process whose
threads compute outside of the lock, or wait, keeps all cores.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

LOOK_S = 0.25
BUSY, PARALLEL = 0.6, 1.5
"""CPU seconds a second: from where the lock may be the bound, and from where it is not, since threads compute at once."""
THREADS = Path("/proc/self/task")
LAST_CORE = 36
"""Where `/proc/<pid>/stat` has the core of a thread, counted from behind its name (proc(5), field 39)."""


class OneCore:
    """Decides which cores this process may use. Does nothing where the system has no affinities.

    Args:
        clock: The time, in seconds.
        cpu_time: What the process has computed, in seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_time: Callable[[], float] = time.process_time
    ) -> None:
        self._clock, self._cpu_time = clock, cpu_time
        self._all = os.sched_getaffinity(0) if THREADS.exists() else {0}
        self._lock = threading.Lock()
        self._looked, self._used = clock(), cpu_time()

    def look(self) -> None:
        """Decide anew, if it was not done lately. Called again and again by whatever threads do the work."""
        if len(self._all) > 1 and self._clock() - self._looked >= LOOK_S and self._lock.acquire(blocking=False):
            try:
                self._decide()
            finally:
                self._lock.release()

    def _decide(self) -> None:
        now, used = self._clock(), self._cpu_time()
        rate = (used - self._used) / max(now - self._looked, 1e-9)
        self._looked, self._used = now, used
        on_one = len(os.sched_getaffinity(0)) == 1
        if on_one and rate < BUSY:  # there is less to do, or others are on this core
            keep_on(self._all)
        elif not on_one and BUSY <= rate < PARALLEL:
            keep_on({current_core()})


def keep_on(cores: set[int]) -> None:
    """Keep all threads of this process on some cores, and those that they will start."""
    for thread in THREADS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


def current_core() -> int:
    """The core that the calling thread runs on."""
    return int(Path("/proc/thread-self/stat").read_text().rpartition(") ")[2].split()[LAST_CORE])
