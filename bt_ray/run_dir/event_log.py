"""`events.jsonl` of a run directory: what its model servers and the leases on them did, one JSON object a line."""

import json
import threading
import time
from collections.abc import Sequence

from bt_ray.errors import StorageError
from bt_ray.events import Recorded, event_line
from bt_ray.layout import EVENTS
from bt_ray.run_dir.storage import Storage

OBJECT_S = 30.0
"""Seconds between two writes to an object store, which can only write all of it again."""


class EventLog:
    """Adds to the events of earlier runs. What cannot be written costs no result.

    Args:
        storage: The run directory.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._unwritten: list[str] = []
        self._written_at = 0.0
        self._whole: bytes | None = None

    def add(self, events: Sequence[Recorded]) -> None:
        with self._lock:
            self._unwritten += [json.dumps(event_line(event)) + "\n" for event in events]
            if self._storage.folder is not None or time.monotonic() - self._written_at > OBJECT_S:
                self._write()

    def close(self) -> None:
        """Write what is left."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        lines = "".join(self._unwritten).encode()
        try:
            if self._storage.folder is not None:
                with (self._storage.folder / EVENTS).open("ab") as file:
                    file.write(lines)
            else:
                if self._whole is None:
                    self._whole = self._storage.read(EVENTS) or b""
                self._storage.write(EVENTS, self._whole + lines)
                self._whole += lines
        except (OSError, StorageError):
            return  # the next write may get through
        self._unwritten.clear()
        self._written_at = time.monotonic()
