"""Keeps a process on one core while Python's global interpreter lock is what bounds it.

Threads that hand the lock to each other across cores take twice the CPU time for a request that they take on one core, so a
process on one core asks twice as fast (`scripts/bench_requests.py`). It holds for Python's own work alone: a process whose
threads compute outside of the lock, or wait, keeps all cores, and so do the processes that it starts.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOK_S = 0.25
RECONSIDER_S = 5.0
"""Seconds on one core after which it is looked again at what the process does with all."""
BUSY, PARALLEL = 0.6, 1.5
"""CPU seconds a second: from where the lock may be the bound, and from where it is not, since threads compute at once."""
THREADS = Path("/proc/self/task")
STATE, LAST_CORE = 0, 36
"""Where `/proc/<pid>/stat` has a thread's state and its core, counted from behind its name (proc(5), fields 3 and 39)."""
STARTS_OF_PROCESSES = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"}
"""Python's audit events before another process begins."""


@contextmanager
def one_core() -> Iterator[None]:
    """Look after this process in the context. Does nothing where the system has no affinities, or there is one core."""
    if not THREADS.exists() or len(os.sched_getaffinity(0)) == 1:
        yield
        return
    all_cores, ended = os.sched_getaffinity(0), threading.Event()

    def free_for_a_child(event: str, _: Any) -> None:
        if event in STARTS_OF_PROCESSES and not ended.is_set():
            with contextlib.suppress(OSError):  # a sandbox forbids it, which is no reason to start nothing
                os.sched_setaffinity(0, all_cores)  # of the calling thread, from which the child has its own

    def watch() -> None:
        decision = Decision()
        while not ended.wait(LOOK_S):
            with contextlib.suppress(OSError):  # a sandbox forbids it: then the process stays where it is
                wants_one = decision.after(time.monotonic(), time.process_time())
                core = find_running_core() if wants_one and not decision.on_one else None
                if not wants_one and decision.on_one:
                    keep_on(all_cores)
                elif core is not None:
                    keep_on({core})
                decision.on_one = wants_one and (decision.on_one or core is not None)

    sys.addaudithook(free_for_a_child)
    watching = threading.Thread(target=watch, name="one-core", daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        with contextlib.suppress(OSError):
            keep_on(all_cores)


@dataclass
class Decision:
    """Whether the process is to be on one core, from the times at which it was looked at.

    Attributes:
        on_one: Whether it is.
    """

    on_one: bool = False
    _looked: float = 0.0
    _used: float = 0.0
    _since: float = 0.0

    def after(self, now: float, used: float) -> bool:
        """Decide.

        Args:
            now: The time, in seconds.
            used: The CPU time of the process, in seconds.
        """
        rate = (used - self._used) / max(now - self._looked, 1e-9)
        self._looked, self._used = now, used
        if self.on_one:  # below: there is less to do, or others are on this core
            return rate >= BUSY and now - self._since < RECONSIDER_S
        self._since = now
        return BUSY <= rate < PARALLEL


def keep_on(cores: set[int]) -> None:
    """Keep all threads of this process on some cores, and those that they will start."""
    for thread in THREADS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


def find_running_core() -> int | None:
    """A core on which a thread of this process computes, beside the calling one."""
    for thread in THREADS.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            fields = (thread / "stat").read_text().rpartition(") ")[2].split()
            if fields[STATE] == "R" and int(thread.name) != threading.get_native_id():
                return int(fields[LAST_CORE])
    return None
