"""Cores that a training takes beside its own while nobody else uses them, and gives back when somebody does."""

import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

MOST_THREADS = 16
"""Beyond which a model that is trained on CPU gains nothing."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
IDLE = 0.75
"""Of a core, from where it counts as free."""
CONTENDED = 0.3
"""Of a core, from where others have taken what this process would have used."""


class IdleCores(TrainerCallback):  # type: ignore[misc]
    """Decides after each step how many threads compute the next. What a step gives does not depend on it.

    Args:
        own: Threads that the training has in any case.
    """

    def __init__(self, own: int) -> None:
        self._own = own
        self._most = max(own, min(usable_cores(), MOST_THREADS))
        self._then = _reading()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = _reading()
        seconds, used, idle = (after - before for after, before in zip(now, self._then, strict=True))
        self._then = now
        threads = torch.get_num_threads()
        if seconds > 0:
            wanted = threads_for(threads, self._own, self._most, used=used / seconds, idle=idle / seconds)
            if wanted != threads:
                torch.set_num_threads(wanted)


def threads_for(threads: int, own: int, most: int, *, used: float, idle: float) -> int:
    """How many threads are to compute next.

    Args:
        threads: How many there are.
        own: The least.
        most: The most.
        used: Cores that the process used lately.
        idle: Cores of the machine that nobody used.
    """
    if used + idle < threads - CONTENDED:
        return own
    return min(most, threads + int(idle + 1 - IDLE))


def usable_cores() -> int:
    """The cores that this process may use at once, its container's limit included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = CPU_QUOTA.read_text().partition(" ") if CPU_QUOTA.exists() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _reading() -> tuple[float, float, float]:
    """The time, the CPU time of this process, and the time that all cores were idle, in seconds."""
    return time.monotonic(), time.process_time(), psutil.cpu_times().idle
