"""SHA-256 of whole files, each computed once on a node.

What a file's digest was is kept on the node's own disk, beside what tells that the file is the same: its path, its device
and inode, its size, and when its content and its entry changed last, in nanoseconds.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bt_ray.errors import StorageError
from bt_ray.run_dir.node_disk import node_cache

DIGESTS = "digests"
READERS = 4
"""Files that are read at the same time. Hashing needs a core each."""
SMALL = 1 << 20
"""Bytes up to which a file is read each time."""
SETTLED_S = 2.0
"""Seconds after a file's last change until another one is sure to have another time: clocks of filesystems are coarse."""


def digest_files(files: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file, in hex digits, in the given order.

    Raises:
        OSError: One cannot be read.
    """
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(digest_file, files))


def digest_file(file: Path) -> str:
    """The SHA-256 of one file, in hex digits.

    Raises:
        OSError: It cannot be read.
    """
    before = _identity(file)
    kept = _digest_file(file) if before["size"] > SMALL else None
    if kept is not None and (known := _read(kept, before)) is not None:
        return known
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    settled = time.time() - max(before["changed"], before["entry_changed"]) / 1e9 > SETTLED_S
    if kept is not None and settled and _identity(file) == before:
        _write(kept, {**before, "sha256": digest})
    return digest


def digest_safetensors(folder: Path) -> dict[str, str]:
    """The SHA-256 of each safetensors file of a folder, by name, read anew: to find damage that changes nothing else."""
    digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _identity(file: Path) -> dict[str, int]:
    seen = file.stat()
    return {
        "device": seen.st_dev,
        "inode": seen.st_ino,
        "size": seen.st_size,
        "changed": seen.st_mtime_ns,
        "entry_changed": seen.st_ctime_ns,
    }


def _digest_file(file: Path) -> Path | None:
    """Where a file's digest is kept on this node; None where nothing can be kept."""
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:24]
    try:
        return node_cache() / DIGESTS / f"{name}.json"
    except StorageError:
        return None


def _read(kept: Path, identity: dict[str, int]) -> str | None:
    try:
        values = json.loads(kept.read_text())
        digest = values.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return digest if values == identity and isinstance(digest, str) else None


def _write(kept: Path, values: dict[str, int | str]) -> None:
    part = kept.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}.part")
    with contextlib.suppress(OSError):  # it is computed again next time
        kept.parent.mkdir(exist_ok=True)
        part.write_text(json.dumps(values))
        part.replace(kept)
