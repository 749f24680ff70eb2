"""A run directory's files: on a filesystem, or as objects in a bucket. A file is written whole or not at all.

Names are relative to the run directory, with `/`. Whoever needs more than that (a lock, a child process that writes where it
was told) asks for `folder`, which only a filesystem has.
"""

import json
import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from bt_ray.errors import ConfigError, StorageError
from bt_ray.location import check_location

PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")
"""The name of what is not whole yet, as `_part_of` makes it: of what it is a part."""
MOUNTS = Path("/proc/self/mountinfo")
NETWORK_FILESYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "beegfs",
    "gpfs",
    "ceph",
    "glusterfs",
    "9p",
    "afs",
    "orangefs",
}


class Storage(ABC):
    """One run directory.

    Attributes:
        location: Its absolute path, or its URI. `open_storage(location)` opens it again, on any machine that reaches it.
        folder: Its path on a filesystem, None in an object store.
        in_place: Whether it lies on this machine's own disk, so that nothing is won by a copy.

    Raises:
        StorageError: By every method, when the storage fails: full, not permitted, not reachable.
    """

    location: str
    folder: Path | None
    in_place: bool

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a file, None if there is none."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """The names of what is in `folder`, sorted, hidden ones left out; none if there is no such folder."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """The files in `folder` and all folders in it, relative to it, sorted; those whose own name is hidden left out."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file, or of all that is in a folder; 0 where there is none."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it. Harmless when there is none."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raises `StorageError` if nothing can be written here. Leaves nothing behind, not even the run directory."""

    @abstractmethod
    def upload(self, folder: Path, name: str, last: str) -> None:
        """Copy a folder of this machine's disk to `name`. Its file `last` appears when all others are there."""

    @abstractmethod
    def download(self, name: str, folder: Path) -> None:
        """Copy the folder `name` to this machine's disk, where `folder` appears whole."""

    def read_json(self, name: str) -> Any:
        """The value of a JSON file, None if there is none, or if it is no JSON."""
        content = self.read(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON. Raises `ValueError` if a number in it is not finite, for which JSON has no name."""
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + os.linesep).encode())

    def __reduce__(self) -> Any:
        return open_storage, (self.location,)


@cache
def open_storage(location: str) -> Storage:
    """The storage at an absolute path, or at the URI of an object store.

    Args:
        location: `/shared/runs/today`, `s3://bucket/runs/today`, `gs://bucket/runs/today`. The query of a URI takes the
            options of `pyarrow.fs.FileSystem.from_uri`: `?region=...`, `?endpoint_override=...&scheme=http`. Credentials
            come from where the store's own tools find them: the environment, a profile, the machine's role.

    Raises:
        ConfigError: It is no such path or URI.
        StorageError: The store cannot be reached.
    """
    if "://" not in location:
        return Directory(Path(location))
    check_location(location)
    return Bucket(location)


class Directory(Storage):
    """A run directory on a filesystem: this machine's own, or one that all nodes share.

    Args:
        path: Its absolute path.
        in_place: Whether it is on this machine's own disk. Default: what the kind of filesystem says.
    """

    folder: Path

    def __init__(self, path: Path, *, in_place: bool | None = None) -> None:
        self.location = str(path)
        self.folder = path
        self.in_place = on_own_disk(path) if in_place is None else in_place

    def read(self, name: str) -> bytes | None:
        with self._map_os_errors("read", name) as path:
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._map_os_errors("written", name) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _part_of(path)
            try:
                part.write_bytes(content)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def names(self, folder: str) -> list[str]:
        with self._map_os_errors("listed", folder) as path:
            try:
                return sorted(found.name for found in path.iterdir() if not found.name.startswith("."))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def files(self, folder: str) -> list[str]:
        with self._map_os_errors("listed", folder) as path:
            found = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
            return sorted(name for name in found if not name.rpartition("/")[2].startswith("."))

    def size(self, name: str) -> int:
        with self._map_os_errors("measured", name) as path:
            if path.is_file():
                return path.stat().st_size
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    def check_writable(self) -> None:
        existing = self.folder
        try:
            while not existing.exists():
                existing = existing.parent
            if not existing.is_dir():
                raise StorageError(f"{existing} is a file, not a directory.")
            probe = _part_of(existing / "probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StorageError(f"{existing} cannot be used ({error.strerror}).") from error

    def delete(self, name: str) -> None:
        with self._map_os_errors("deleted", name) as path:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def upload(self, folder: Path, name: str, last: str) -> None:
        with self._map_os_errors("written", name) as path:
            _copy_whole(folder, path)

    def download(self, name: str, folder: Path) -> None:
        with self._map_os_errors("copied", name) as path:
            _copy_whole(path, folder)

    @contextmanager
    def _map_os_errors(self, what: str, name: str) -> Iterator[Path]:
        path = self.folder / name
        try:
            yield path
        except OSError as error:
            raise StorageError(f"{path} cannot be {what}: {error.strerror or error}") from error


class Bucket(Storage):
    """A run directory in an object store, through `pyarrow.fs`.

    An object appears when its upload is complete, so there is nothing to rename.

    Args:
        location: Its URI.
    """

    folder = None
    in_place = False

    def __init__(self, location: str) -> None:
        from pyarrow import fs

        self.location = location
        parts = urlsplit(location)
        self._shown = urlunsplit(parts._replace(query="", fragment=""))
        query = f"{parts.query}&allow_delayed_open=true" if parts.scheme == "s3" else parts.query  # one request, not three
        try:
            self._filesystem, root = fs.FileSystem.from_uri(urlunsplit(parts._replace(query=query.lstrip("&"))))
        except ValueError as error:
            raise ConfigError(f"{self._shown}: {error}") from None
        except OSError as error:
            raise StorageError(f"{self._shown} cannot be reached: {error}") from error
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        with self._map_os_errors("read", name) as path:
            try:
                with self._filesystem.open_input_stream(path) as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._map_os_errors("written", name) as path:
            stream = self._filesystem.open_output_stream(path)
            stream.write(content)
            stream.close()

    def names(self, folder: str) -> list[str]:
        with self._map_os_errors("listed", folder) as path:
            found = [info.base_name for info in self._infos(path, recursive=False)]
            return sorted(name for name in found if not name.startswith("."))

    def files(self, folder: str) -> list[str]:
        with self._map_os_errors("listed", folder) as path:
            found = [info for info in self._infos(path, recursive=True) if info.is_file]
            return sorted(info.path.removeprefix(f"{path}/") for info in found if not info.base_name.startswith("."))

    def size(self, name: str) -> int:
        with self._map_os_errors("measured", name) as path:
            return sum(info.size or 0 for info in [*self._infos(path, recursive=True), self._filesystem.get_file_info(path)])

    def check_writable(self) -> None:
        probe = f".probe-{uuid.uuid4().hex[:8]}"
        self.write(probe, b"")
        with self._map_os_errors("deleted", probe) as path:
            self._filesystem.delete_file(path)

    def delete(self, name: str) -> None:
        from pyarrow import fs

        with self._map_os_errors("deleted", name) as path:
            kind = self._filesystem.get_file_info(path).type
            if kind == fs.FileType.Directory:
                self._filesystem.delete_dir(path)
            elif kind == fs.FileType.File:
                self._filesystem.delete_file(path)

    def upload(self, folder: Path, name: str, last: str) -> None:
        with self._map_os_errors("written", name) as path:
            self._filesystem.delete_dir_contents(path, missing_dir_ok=True)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            for file in sorted(files, key=lambda file: file.name == last):
                self._put(file, f"{path}/{file.relative_to(folder).as_posix()}")

    def download(self, name: str, folder: Path) -> None:
        from pyarrow import fs

        with self._map_os_errors("copied", name) as path:
            part = _part_of(folder)
            part.mkdir(parents=True)
            try:
                fs.copy_files(
                    path, str(part), source_filesystem=self._filesystem, destination_filesystem=fs.LocalFileSystem()
                )
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)

    def _put(self, file: Path, path: str) -> None:
        from pyarrow import fs

        fs.copy_files(str(file), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=self._filesystem)

    def _infos(self, path: str, *, recursive: bool) -> list[Any]:
        from pyarrow import fs

        infos: list[Any] = self._filesystem.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))
        return infos

    @contextmanager
    def _map_os_errors(self, what: str, name: str) -> Iterator[str]:
        try:
            yield f"{self._root}/{name}".rstrip("/")
        except OSError as error:
            raise StorageError(f"{self._shown}/{name} cannot be {what}: {error}") from error


def on_own_disk(path: Path) -> bool:
    """Whether `path` lies, or would lie, on a disk of this machine's own rather than on a network filesystem."""
    path = path.resolve()
    mounted, kind = Path("/"), ""
    if not MOUNTS.exists():
        return True
    for line in MOUNTS.read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].replace("\\040", " "))
        if path.is_relative_to(mount) and mount.is_relative_to(mounted):
            mounted, kind = mount, after.split()[0]
    return kind not in NETWORK_FILESYSTEMS and (not kind.startswith("fuse") or "overlay" in kind)


def _part_of(path: Path) -> Path:
    """A new name beside `path` for what is not whole yet."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def remove_parts(path: Path) -> None:
    """Remove what was left beside `path` when its making was cut off. For whoever knows that nobody makes it now."""
    for beside in path.parent.iterdir():
        if (part := PART.fullmatch(beside.name)) and part[1] == path.name:
            shutil.rmtree(beside, ignore_errors=True)


def _copy_whole(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(target)
    try:
        shutil.copytree(source, part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
