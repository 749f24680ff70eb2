"""A run directory's files, on a disk, on a shared filesystem, and in an object store over a real socket."""

import pickle
import threading
from pathlib import Path

import pytest
from support.object_store import ObjectStore

from bt_ray.errors import ConfigError, StorageError
from bt_ray.location import check_location, parent_and_name
from bt_ray.run_dir.storage import Directory, Storage, on_own_disk, open_storage


def test_a_file_is_read_as_it_was_written(storage: Storage) -> None:
    assert storage.read("folder/file") is None
    assert storage.names("folder") == []
    storage.write("folder/file", b"first")
    storage.write("folder/file", b"second")
    storage.write("folder/.hidden", b"")
    storage.write_json("folder/below/value.json", {"a": [1, None]})
    assert storage.read("folder/file") == b"second"
    assert storage.read_json("folder/below/value.json") == {"a": [1, None]}
    assert storage.read_json("folder/file") is None, "it is no JSON"
    assert storage.names("folder") == ["below", "file"]
    assert storage.size("folder/file") == len(b"second")
    assert storage.size("folder") > len(b"second")
    assert storage.size("nothing") == 0
    assert storage.files("") == ["folder/below/value.json", "folder/file"]
    assert storage.files("folder") == ["below/value.json", "file"]
    assert storage.files("nothing") == []
    assert storage.names("folder/file") == []
    assert storage.read("folder/file/below") is None


def test_what_is_deleted_is_gone_with_all_that_is_in_it(storage: Storage) -> None:
    for name in ("a/b/c", "a/d", "e"):
        storage.write(name, b"x")
    for name in ("a", "e", "nothing"):
        storage.delete(name)
    assert storage.names("") == []


def test_a_folder_is_copied_whole(storage: Storage, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "below").mkdir(parents=True)
    (made / "below" / "large").write_bytes(b"x" * 6_000_000)
    (made / "manifest").write_text("{}")
    storage.write("weights/w/of-an-earlier-copy", b"")
    storage.upload(made, "weights/w", last="manifest")
    assert storage.names("weights/w") == ["below", "manifest"]
    storage.download("weights/w", tmp_path / "got")
    assert (tmp_path / "got" / "below" / "large").read_bytes() == b"x" * 6_000_000
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == ["below", "manifest"]
    with pytest.raises(StorageError):
        storage.download("weights/nothing", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_writers_at_once_leave_a_whole_file(storage: Storage) -> None:
    contents = {bytes([letter]) * 100_000 for letter in b"abcdefgh"}
    seen: set[bytes | None] = set()

    def write(content: bytes) -> None:
        for _ in range(10):
            storage.write("folder/file", content)
            seen.add(storage.read("folder/file"))

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= contents
    assert storage.names("folder") == ["file"], "no part of a file is left"


def test_a_look_whether_it_can_be_written_leaves_nothing(storage: Storage) -> None:
    storage.check_writable()
    assert storage.names("") == []
    assert storage.folder is None or not storage.folder.exists()


def test_another_process_opens_the_same(storage: Storage) -> None:
    storage.write("file", b"x")
    assert pickle.loads(pickle.dumps(storage)).read("file") == b"x"


def test_a_disk_that_fails_says_where(tmp_path: Path) -> None:
    storage = Directory(tmp_path)
    storage.write("file", b"")
    with pytest.raises(StorageError, match=r"file/below cannot be written: (Not a directory|File exists)"):
        storage.write("file/below", b"")
    with pytest.raises(StorageError, match="/dev/full/x cannot be written"):
        Directory(Path("/dev/full")).write("x", b"")


@pytest.mark.parametrize("kind", ["500", "503", "reset"])
def test_an_object_store_that_fails_for_a_while_is_asked_again(s3: ObjectStore, tmp_path: Path, kind: str) -> None:
    storage = open_storage(f"s3://bucket/{tmp_path.name}")
    s3.fail(kind=kind, share=0.3, seed=4)
    try:
        for number in range(5):
            storage.write(f"folder/{number}", str(number).encode())
            assert storage.read(f"folder/{number}") == str(number).encode()
    finally:
        s3.fail()
    assert storage.names("folder") == list("01234")


def test_an_object_store_that_fails_says_where(s3: ObjectStore, tmp_path: Path) -> None:
    storage = open_storage(f"s3://bucket/{tmp_path.name}")
    s3.fail(kind="503", share=1.0)
    try:
        with pytest.raises(StorageError, match=rf"s3://bucket/{tmp_path.name}/file cannot be read: .*503"):
            storage.read("file")
        with pytest.raises(StorageError, match=rf"s3://bucket/{tmp_path.name}/file cannot be written: .*503"):
            storage.write("file", b"")
    finally:
        s3.fail()
    assert storage.read("file") is None
    with pytest.raises(StorageError, match="no-such-bucket"):
        open_storage("s3://no-such-bucket/run").check_writable()


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("ftp://host/run", "ftp:// is not supported"),
        ("s3://", "names no bucket"),
        ("s3://key:secret@bucket/run", "credentials do not belong into a URI"),
    ],
)
def test_a_location_that_cannot_be_is_refused(location: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        check_location(location)
    assert "secret" not in str(caught.value)


def test_a_location_has_a_parent() -> None:
    assert parent_and_name("s3://bucket/runs/today/best/?region=eu") == ("s3://bucket/runs/today?region=eu", "best")
    assert parent_and_name("/shared/runs/today/best") == ("/shared/runs/today", "best")


def test_a_disk_of_this_machine_is_told_from_a_network_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:3 / {tmp_path} rw shared:1 - nfs4 host:/x rw\n"
    (tmp_path / "mountinfo").write_text(mounts)
    monkeypatch.setattr("bt_ray.run_dir.storage.MOUNTS", tmp_path / "mountinfo")
    assert on_own_disk(Path("/home"))
    assert not on_own_disk(tmp_path / "not" / "there" / "yet")
