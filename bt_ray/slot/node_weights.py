"""The weights of a run directory as one node uses them: each is copied to the node's own disk once, or loaded in place.

Copies lie in a folder that all slots of a node share, under the weights' ids, which are never used for two contents. What
is in use is locked; what is not makes room, the least recently used first, when the disk fills up.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bt_ray.errors import StorageError
from bt_ray.layout import WEIGHTS
from bt_ray.run_dir.node_disk import CACHE_VARIABLE, node_cache
from bt_ray.run_dir.storage import PART, Storage, open_storage, remove_parts
from bt_ray.slot.file_digest import digest_safetensors
from bt_ray.weights import MANIFEST, Weights, weights_gone

RESERVE = 0.05
"""Share of the disk that copies leave free."""
AGAIN_S = 0.1
"""Seconds after which a slot that lacks a copy looks again what another one does about it."""


class NodeWeights:
    """What a node loads weights from.

    Args:
        storage: The run directory.
        scratch: Where a training leaves weights that are not in the run directory yet.
        cache: The folder for copies, on the same disk; default `node_cache()`.
    """

    def __init__(self, storage: Storage, scratch: Path, cache: Path | None = None) -> None:
        self._storage = storage
        self._scratch = scratch
        self._copies = (cache or node_cache()) / WEIGHTS
        self._whole: set[str] = set()

    @contextmanager
    def loadable(self, weights: Weights) -> Iterator[Weights]:
        """The weights with a path that can be loaded on this node as long as the context lasts.

        Raises:
            StorageError: They cannot be had.
        """
        storage = self._storage_of(weights)
        if weights.parent is None:
            yield weights
        elif storage.in_place and storage.folder is not None:
            folder = storage.folder / weights.path
            if not (folder / MANIFEST).is_file():
                raise self._gone(weights)
            yield replace(weights, path=str(folder))
        else:
            with self._copy(weights) as folder:
                yield replace(weights, path=str(folder))

    def check(self, weights: Weights) -> None:
        """Whether the files of a fine-tune, made loadable, are as its training left them. Each is read whole, once.

        Raises:
            StorageError: One is not. If it is this node's copy, whoever loads it next copies it again.
        """
        if weights.parent is None or weights.id in self._whole:
            return
        folder = Path(weights.path)
        recorded = json.loads((folder / MANIFEST).read_text()).get("files", {})
        found = digest_safetensors(folder) if recorded else {}
        if damaged := [name for name, digest in recorded.items() if found.get(name) != digest]:
            if folder.parent == self._copies:
                (folder / MANIFEST).unlink(missing_ok=True)
            raise StorageError(f"{folder / damaged[0]} is not as its training left it.")
        self._whole.add(weights.id)

    def folder_for(self, weights_id: str) -> Path:
        """Where a training on this node leaves new weights."""
        if self._storage.in_place and self._storage.folder is not None:
            return self._storage.folder / WEIGHTS / weights_id
        return self._scratch / WEIGHTS / weights_id

    def keep(self, weights_id: str) -> None:
        """Let what a training left in `folder_for` count, for all nodes. This one has its copy already."""
        if self._storage.in_place:
            return
        folder = self.folder_for(weights_id)
        self._storage.upload(folder, f"{WEIGHTS}/{weights_id}", last=MANIFEST)
        self._copies.mkdir(parents=True, exist_ok=True)
        folder.rename(self._copies / weights_id)

    def discard(self, weights_id: str) -> None:
        """Remove what a training left that did not end well."""
        shutil.rmtree(self.folder_for(weights_id), ignore_errors=True)

    @contextmanager
    def _copy(self, weights: Weights) -> Iterator[Path]:
        folder = self._copies / weights.id
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{weights.id}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            while not (folder / MANIFEST).is_file():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # another slot makes the copy, or has made it, and keeps it while it serves it
                    fcntl.flock(lock, fcntl.LOCK_UN)
                    time.sleep(AGAIN_S)
                else:
                    if not (folder / MANIFEST).is_file():
                        self._make_copy(weights, folder)
                fcntl.flock(lock, fcntl.LOCK_SH)  # for a moment it is nobody's, so the loop looks again
            os.utime(folder)
            yield folder

    def _make_copy(self, weights: Weights, folder: Path) -> None:
        remove_parts(folder)
        storage = self._storage_of(weights)
        self._make_room(storage.size(weights.path))
        storage.download(weights.path, folder)
        if not (folder / MANIFEST).is_file():
            raise self._gone(weights)

    def _gone(self, weights: Weights) -> StorageError:
        return weights_gone(weights.path, self._storage.location, weights.origin)

    def _storage_of(self, weights: Weights) -> Storage:
        return self._storage if weights.origin is None else open_storage(weights.origin)

    def _make_room(self, size: int) -> None:
        """Remove what was left of copies that were cut off, and copies that nobody uses until `size` bytes fit.

        Raises:
            StorageError: They do not, whatever is removed.
        """
        copies = self._copies
        wanted = size + RESERVE * shutil.disk_usage(copies).total
        for weights_id in {part[1] for path in copies.iterdir() if (part := PART.fullmatch(path.name))}:
            with self._unused(weights_id) as unused:
                if unused:
                    remove_parts(copies / weights_id)
        for folder in sorted((f for f in copies.iterdir() if not f.name.startswith(".")), key=_last_used):
            if shutil.disk_usage(copies).free >= wanted:
                return
            with self._unused(folder.name) as unused:
                if unused:
                    (folder / MANIFEST).unlink(missing_ok=True)
                    shutil.rmtree(folder, ignore_errors=True)
        if shutil.disk_usage(copies).free < size:
            raise StorageError(
                f"{copies} has {shutil.disk_usage(copies).free / 1e9:.1f} GB free, the weights need {size / 1e9:.1f} GB. "
                f"Free some space, or name a folder on another disk in {CACHE_VARIABLE}."
            )

    @contextmanager
    def _unused(self, weights_id: str) -> Iterator[bool]:
        """Whether nobody uses or makes a copy; nobody does in the context, if so."""
        with (self._copies / f".{weights_id}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _last_used(copy: Path) -> float:
    """When a copy was last used, as Unix time; it may be removed meanwhile."""
    try:
        return copy.stat().st_mtime
    except FileNotFoundError:
        return 0.0
