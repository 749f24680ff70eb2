"""A run directory's files. Names are relative to it, with `/`; a file is written whole or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bt_ray.errors import StorageError


class Storage:
    """One run directory: a local path, or one that all nodes share.

    Args:
        location: Its absolute path.

    Raises:
        StorageError: By every method, when the storage fails: full, not permitted, not reachable.
    """

    def __init__(self, location: Path) -> None:
        self.location = location

    def read(self, name: str) -> bytes | None:
        """The content of a file, None if there is none."""
        with self._told("read", name) as path:
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def read_json(self, name: str) -> Any:
        """The value of a JSON file, None if there is none, or if it is no JSON."""
        content = self.read(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        with self._told("written", name) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
            try:
                part.write_bytes(content)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=2) + os.linesep).encode())

    def names(self, folder: str) -> list[str]:
        """The names of what is in `folder`, sorted; none if there is no such folder."""
        with self._told("listed", folder) as path:
            try:
                return sorted(found.name for found in path.iterdir() if not found.name.startswith("."))
            except FileNotFoundError:
                return []

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it. Harmless when there is none."""
        with self._told("deleted", name) as path:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def _told(self, what: str, name: str) -> Iterator[Path]:
        path = self.location / name
        try:
            yield path
        except OSError as error:
            raise StorageError(f"{path} cannot be {what}: {error.strerror or error}") from error
