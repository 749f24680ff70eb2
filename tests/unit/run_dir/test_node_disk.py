"""What processes put on a node's disk: it is theirs alone, and goes with them, however they end."""

import subprocess
import sys
from pathlib import Path

import pytest

from bt_ray.errors import StorageError
from bt_ray.run_dir.node_disk import Scratch, node_cache

HOLD = """
import sys, time
from bt_ray.run_dir.node_disk import Scratch
held = Scratch("held")
print(held.folder, flush=True)
time.sleep(600)
"""


def test_the_cache_is_this_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BT_RAY_CACHE", str(tmp_path / "mine"))
    assert node_cache() == tmp_path / "mine"
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(StorageError, match="belongs to another user"):
        node_cache()
    monkeypatch.setenv("BT_RAY_CACHE", "/dev/null/cache")
    with pytest.raises(StorageError, match="BT_RAY_CACHE"):
        node_cache()


def test_a_home_that_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BT_RAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert node_cache().parent == tmp_path


def test_a_killed_process_leaves_its_folder_to_the_next_to_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BT_RAY_CACHE", str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    theirs = Path(holder.stdout.readline().strip())
    (theirs / "file").write_text("x")
    with Scratch("ours") as ours:
        assert {folder.name for folder in (tmp_path / "scratch").iterdir()} == {theirs.name, ours.folder.name}
    assert [folder.name for folder in (tmp_path / "scratch").iterdir()] == [theirs.name]
    holder.kill()
    holder.wait()
    with Scratch("ours") as ours:
        assert [folder.name for folder in (tmp_path / "scratch").iterdir()] == [ours.folder.name]
