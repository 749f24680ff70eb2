"""Find and watch the processes that a test started, however indirectly: they all carry the test's mark."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import psutil

T = TypeVar("T")
MARK = "BT_RAY_TEST_RUN"
MODEL_PROCESSES = ("scripted_server.py", "scripted_trainer.py", "vllm_main", "training.main", "keeper.py")


@dataclass
class MarkedProcesses:
    """Processes whose environment carries one mark."""

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, MARK: self.mark}

    def all(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def named(self, *parts: str) -> list[psutil.Process]:
        found = []
        for process in self.all():
            try:
                if any(part in " ".join(process.cmdline()) for part in parts):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def running(self, script: str) -> list[psutil.Process]:
        """Those that run this Python script; not the keepers, which name it as what they start."""
        found = []
        for process in self.named(script):
            try:
                if process.cmdline()[1].endswith(script):
                    found.append(process)
            except (psutil.Error, IndexError):
                continue
        return found

    def models(self) -> list[psutil.Process]:
        """Servers, trainings and their keepers."""
        return self.named(*MODEL_PROCESSES)


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL each that still runs: the end of one may be the end of others before it is their turn."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


LIMIT_S = 300
"""Seconds after which what a test waits for never comes: less than pytest's limit for the test, whose message says less."""


def wait_for(what: str, look: Callable[[], T]) -> T:
    """What `look` returns as soon as it is true."""
    deadline = time.monotonic() + LIMIT_S
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.05)
    return seen
