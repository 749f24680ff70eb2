"""Cores that a training takes beside its own while nobody else uses them, and gives back when somebody does."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

MOST_THREADS = 16
"""Beyond which a model that is trained on CPU gains nothing."""
QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
NO_LIMIT = ("max", "-1")
IDLE = 0.75
"""Of a core, from where it counts as free."""
CONTENDED = 0.3
"""Of a core, from where others have taken what this process would have used."""


class IdleCores(TrainerCallback):  # type: ignore[misc]
    """Decides after each step how many threads compute the next. In a container with a limit of CPU time it stays at `own`.

    Args:
        own: Threads that the training has in any case.
    """

    def __init__(self, own: int) -> None:
        self._own = own
        self._cores = find_allowed_cores()
        self._most = own if has_quota() else max(own, min(len(self._cores), MOST_THREADS))
        self._then = _read_times(self._cores)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = _read_times(self._cores)
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


def find_allowed_cores() -> list[int]:
    """The cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def has_quota() -> bool:
    """Whether the container has a limit of CPU time, of which the machine's idle cores say nothing."""
    limits = [file.read_text().split()[0] for file in QUOTAS if file.exists()]
    return any(limit not in NO_LIMIT for limit in limits)


def _read_times(cores: Sequence[int]) -> tuple[float, float, float]:
    """The time, the CPU time of this process, and the time that these cores were idle, in seconds."""
    by_core = psutil.cpu_times(percpu=True)
    return time.monotonic(), time.process_time(), sum(by_core[core].idle for core in cores if core < len(by_core))
