"""A node's own disk: where copies of weights lie, and where processes put what is not in the run directory."""

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from bt_ray.errors import StorageError
from bt_ray.run_dir.storage import on_own_disk

CACHE_VARIABLE = "BT_RAY_CACHE"
LOCK = ".lock"


def node_cache() -> Path:
    """bt_ray's folder on this node's own disk, this user's alone.

    It is what `BT_RAY_CACHE` names, else below the home directory if that can be written and is on the node's own disk, else
    below the system's temporary folder.

    Raises:
        StorageError: It cannot be made, or it is somebody else's.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return _own_folder(Path(named))
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "bt_ray"
    if home.is_absolute() and on_own_disk(home):
        with contextlib.suppress(StorageError):
            return _own_folder(home)
    return _own_folder(Path(tempfile.gettempdir()) / f"bt_ray-{os.getuid()}")


def _own_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise StorageError(f"{folder} belongs to another user: name a folder of your own in {CACHE_VARIABLE}.")
    except OSError as error:
        raise StorageError(f"{folder} cannot be used: {error.strerror}. Name another in {CACHE_VARIABLE}.") from error
    return folder


class Scratch:
    """A folder of this process's own, until `remove()` or the end of the context.

    A process that is killed removes nothing, so each new one first removes what others left that are gone: the operating
    system's lock on a folder ends with its process.

    Args:
        name: Begins the folder's name.
        cache: The node's folder; default `node_cache()`.

    Raises:
        StorageError: It cannot be made.
    """

    def __init__(self, name: str, cache: Path | None = None) -> None:
        folders = (cache or node_cache()) / "scratch"
        try:
            folders.mkdir(parents=True, exist_ok=True)
            for folder in folders.glob("[!.]*"):
                _remove_if_left(folder)
            self.folder = folders / f"{name}-{secrets.token_hex(6)}"
            made = self.folder.with_name(f".{self.folder.name}")
            made.mkdir()
            self._lock = (made / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            made.rename(self.folder)  # locked before anybody sees it
        except OSError as error:
            raise StorageError(f"{folders} cannot be used: {error.strerror}.") from error

    def remove(self) -> None:
        """Remove the folder and all that is in it. Harmless when that was done."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def _remove_if_left(folder: Path) -> None:
    try:
        with (folder / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # it is in use, or another process has just removed it
        return
