"""A node's copies of weights: made once, kept while in use, removed when the disk fills up."""

import fcntl
import json
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from support.processes import wait_for

from bt_ray.errors import StorageError
from bt_ray.run_dir.storage import Directory, Storage
from bt_ray.slot.node_weights import NodeWeights
from bt_ray.weights import MANIFEST, Weights, fine_tuned


def trained(storage: Storage, tmp_path: Path, weights_id: str) -> Weights:
    """Weights in the run directory, as a fine-tune leaves them."""
    manifest = {"id": weights_id, "parent": "base"}
    folder = tmp_path / "made" / weights_id
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights_id.encode() * 1000)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    storage.upload(folder, f"weights/{weights_id}", last=MANIFEST)
    return fine_tuned(manifest)


def node(storage: Storage, disk: Path) -> NodeWeights:
    return NodeWeights(storage, disk / "scratch", disk)


def content(weights: Weights) -> bytes:
    return (Path(weights.path) / "model.safetensors").read_bytes()


def test_weights_can_be_loaded_by_a_path(storage: Storage, tmp_path: Path) -> None:
    weights = trained(storage, tmp_path, "ft-1")
    with node(storage, tmp_path / "cache").loadable(weights) as loadable:
        assert content(loadable) == b"ft-1" * 1000
        assert storage.in_place == Path(loadable.path).is_relative_to(tmp_path / "run")
    base = Weights("base", "org/model")
    with node(storage, tmp_path / "cache").loadable(base) as loadable:
        assert loadable == base
    gone = node(storage, tmp_path / "cache").loadable(fine_tuned({"id": "ft-gone", "parent": "base"}))
    with pytest.raises(StorageError, match="ft-gone"):
        gone.__enter__()


def test_several_slots_of_a_node_copy_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Directory(tmp_path / "run", in_place=False)
    weights = trained(storage, tmp_path, "ft-1")
    copied: list[str] = []
    download = Directory.download

    def counting(self: Directory, name: str, folder: Path) -> None:
        copied.append(name)
        download(self, name, folder)

    monkeypatch.setattr(Directory, "download", counting)
    seen: list[bytes] = []

    def load() -> None:
        with node(storage, tmp_path / "cache").loadable(weights) as loadable:
            seen.append(content(loadable))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [b"ft-1" * 1000] * 8
    assert copied == ["weights/ft-1"]


def test_a_slot_does_not_wait_for_one_that_serves_what_both_wanted(tmp_path: Path) -> None:
    storage = Directory(tmp_path / "run", in_place=False)
    weights, copies = trained(storage, tmp_path, "ft-1"), tmp_path / "cache" / "weights"
    copies.mkdir(parents=True)
    seen: list[bytes] = []

    def load() -> None:
        with node(storage, tmp_path / "cache").loadable(weights) as loadable:
            seen.append(content(loadable))

    with (copies / ".ft-1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # another slot is about to make the copy
        loading = threading.Thread(target=load, daemon=True)
        loading.start()
        wait_for("the slot to find no copy", lambda: locks_open(copies / ".ft-1.lock") == 2)
        storage.download("weights/ft-1", copies / "ft-1")
        loading.join(30)
        assert seen == [b"ft-1" * 1000], "it is served elsewhere, and the lock is held"


def locks_open(file: Path) -> int:
    """How often this process has a file open."""
    return sum(os.path.realpath(link) == str(file.resolve()) for link in Path("/proc/self/fd").iterdir())


def test_copies_that_nobody_uses_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Directory(tmp_path / "run", in_place=False)
    here = node(storage, tmp_path / "cache")
    first, second, third = (trained(storage, tmp_path, f"ft-{n}") for n in (1, 2, 3))
    room = 10_000

    def usage(folder: Path) -> Any:
        used = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        return namedtuple("Usage", "total used free")(room, used, room - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with here.loadable(first) as in_use:
        with here.loadable(second):
            pass
        with here.loadable(third) as loadable:
            assert content(loadable) == b"ft-3" * 1000
            names = {path.name for path in (tmp_path / "cache" / "weights").iterdir() if not path.name.startswith(".")}
            assert names == {"ft-1", "ft-3"}
            with pytest.raises(StorageError, match="BT_RAY_CACHE"), here.loadable(second):
                pass
        assert content(in_use) == b"ft-1" * 1000


def test_what_is_left_of_copies_that_were_cut_off_goes_but_not_what_is_under_way(tmp_path: Path) -> None:
    storage = Directory(tmp_path / "run", in_place=False)
    weights, copies = trained(storage, tmp_path, "ft-0.1"), tmp_path / "cache" / "weights"
    for name in (".ft-0.1.0123abcd.part", ".ft-0.2.0123abcd.part", ".ft-0.3.0123abcd.part"):
        (copies / name).mkdir(parents=True)
    with (copies / ".ft-0.3.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with node(storage, tmp_path / "cache").loadable(weights) as loadable:
            assert content(loadable) == b"ft-0.1" * 1000
    assert [part.name for part in copies.glob(".*.part")] == [".ft-0.3.0123abcd.part"]


def test_what_a_training_left_counts_for_all_nodes(storage: Storage, tmp_path: Path) -> None:
    here = node(storage, tmp_path / "cache")
    for weights_id in ("ft-kept", "ft-discarded"):
        folder = here.folder_for(weights_id)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"new")
        (folder / MANIFEST).write_text(json.dumps({"id": weights_id, "parent": "base"}))
    here.keep("ft-kept")
    here.discard("ft-discarded")
    assert storage.names("weights") == ["ft-kept"]
    with node(storage, tmp_path / "of-another-node").loadable(fine_tuned({"id": "ft-kept", "parent": "b"})) as there:
        assert content(there) == b"new"
