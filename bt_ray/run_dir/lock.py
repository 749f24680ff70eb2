"""One driver at a time holds a run directory.

On a filesystem that is a lock of the operating system's, which ends with its holder. An object store has none: there the
holder writes its name every few seconds, and who finds a name that no longer changes takes over; at once, if the holder ran
on this machine and is seen to be gone. Should two drivers hold one all the same, they lose time and nothing else: the
store's fencing numbers decide which step counts.
"""

import contextlib
import fcntl
import itertools
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from bt_ray.errors import ConfigError, StorageError
from bt_ray.layout import LOCK
from bt_ray.run_dir.storage import Storage

BEAT_S = 3.0
DEAD_AFTER_S = 15.0
SETTLE_S = 1.0


def held(storage: Storage, tell: Callable[[str], None] = lambda text: None) -> AbstractContextManager[int]:
    """The run directory, for one driver at a time. Gives how many drivers have held it, this one included.

    Args:
        storage: The run directory.
        tell: Told why this takes a while.

    Raises:
        ConfigError: Another driver holds it.
    """
    return _file_lock(storage.folder) if storage.folder is not None else _heartbeat(storage, tell)


@contextmanager
def _file_lock(folder: Path) -> Iterator[int]:
    with ExitStack() as opened:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context((folder / LOCK).open("a+"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.seek(0)
            drivers = int(lock.read() or 0) + 1
            lock.truncate(0)
            lock.write(str(drivers))
            lock.flush()
        except BlockingIOError:
            raise _is_held(str(folder)) from None
        except OSError as error:
            raise StorageError(f"{folder} cannot be used: {error.strerror}.") from error
        yield drivers


@contextmanager
def _heartbeat(storage: Storage, tell: Callable[[str], None]) -> Iterator[int]:
    drivers = 1 + _drivers_before(storage, tell)
    beats = _Beats(storage, drivers)
    time.sleep(SETTLE_S)  # of two drivers that start at once, the one that wrote last stays
    if not beats.mine():
        raise _is_held(storage.location)
    beats.start()
    try:
        yield drivers
    except KeyboardInterrupt:
        if beats.taken_over:
            raise StorageError(f"{storage.location} was taken over by another driver, so this one stops.") from None
        raise
    finally:
        beats.end()


def _drivers_before(storage: Storage, tell: Callable[[str], None]) -> int:
    """How many drivers held the run directory, none of which does any more."""
    found = storage.read_json(LOCK)
    if found is None:
        return 0
    if found["held"] and not _is_gone(found.get("process")):
        tell(f"Waiting up to {DEAD_AFTER_S:.0f} s, to see whether another driver holds the run directory")
        deadline = time.monotonic() + DEAD_AFTER_S
        while time.monotonic() < deadline:
            time.sleep(1)
            if storage.read_json(LOCK) != found:
                raise _is_held(storage.location)
    return int(found["drivers"])


class _Beats:
    """The holder's name, written again every few seconds."""

    def __init__(self, storage: Storage, drivers: int) -> None:
        self._storage = storage
        self._name = secrets.token_hex(8)
        self._drivers = drivers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hold-run-directory", daemon=True)
        self.taken_over = False
        self._process = this_process()
        self._write(beat=0)

    def start(self) -> None:
        self._thread.start()

    def mine(self) -> bool:
        found = self._storage.read_json(LOCK)
        return found is not None and found["name"] == self._name

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        if not self.taken_over:
            with contextlib.suppress(StorageError):  # whoever comes next waits to see that nobody writes here
                self._write(beat=-1, held=False)

    def _write(self, beat: int, held: bool = True) -> None:
        holder = {"name": self._name, "process": self._process, "drivers": self._drivers}
        self._storage.write_json(LOCK, {"held": held, "beat": beat, **holder})

    def _run(self) -> None:
        for beat in itertools.count(1):
            if self._ended.wait(BEAT_S):
                return
            with contextlib.suppress(StorageError):  # the next beat may get through
                if not self.mine():
                    self.taken_over = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self._write(beat)


def this_process() -> dict[str, str | int]:
    """What tells this process from any other, on any machine: where process ids mean the same, its own, and its start."""
    return {"where": _process_ids_here(), "pid": os.getpid(), "started": _start_time(os.getpid()) or 0}


def _is_gone(process: dict[str, str | int] | None) -> bool:
    """Whether a process of this machine is seen to have ended. Of another machine's nothing is seen."""
    if process is None or not process["where"] or process["where"] != _process_ids_here():
        return False
    return _start_time(int(process["pid"])) != process["started"]


def _process_ids_here() -> str:
    """Names this boot of this machine, and the namespace of its process ids: containers share the one, not the other.

    Empty where the operating system does not say.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None if it is gone, or a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _is_held(location: str) -> ConfigError:
    return ConfigError(f"run_dir: another sweep is running in {location}. Wait for it, or use --run-dir.")
