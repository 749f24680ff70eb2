"""A run directory on a disk that is full: a clear error, no step lost, and the same command goes on when there is room."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.sweep_files import toml

pytestmark = pytest.mark.long
SMALL_DISK = """
mount -t tmpfs -o size=2m tmpfs "$RUN_DIR"
sweep() { "$PYTHON" -m bt_ray.cli sweep "$TOML" --strategy "$1"; }
sweep "p" > first.txt 2>&1
free=$(df --output=avail -k "$RUN_DIR" | tail -n 1)
head -c $(( (free - LEFT_KIB) * 1024 )) /dev/zero > "$RUN_DIR/.filler"
status=0; sweep "p -> w" > full.txt 2>&1 || status=$?; echo $status > status.txt
rm "$RUN_DIR/.filler"
sweep "p -> w" > again.txt 2>&1
cp "$RUN_DIR/result.json" .
"""
IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.parametrize("left_kib", [0, 24])
def test_a_full_disk_loses_no_step(settings: dict[str, Any], tmp_path: Path, left_kib: int) -> None:
    if shutil.which("unshare") is None or subprocess.run([*IN_A_NAMESPACE, "true"], check=False).returncode:
        pytest.skip("this system lets nobody but root mount a small disk")
    (tmp_path / "run").mkdir()
    server = {**settings["server"], "count": 1, "cpus": 0.5}
    (tmp_path / "sweep.toml").write_text(toml({**settings, "server": server}))
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TOML": str(tmp_path / "sweep.toml"),
        "RUN_DIR": settings["run_dir"],
        "LEFT_KIB": str(left_kib),
    }
    done = subprocess.run([*IN_A_NAMESPACE, "bash", "-euc", SMALL_DISK], cwd=tmp_path, env=env, check=False)
    full, again = ((tmp_path / name).read_text() for name in ("full.txt", "again.txt"))
    assert (tmp_path / "status.txt").read_text() == "1\n", full
    assert "No space left on device" in full
    assert "Traceback" not in full
    assert done.returncode == 0, again
    assert "2 of 3 steps are finished already" in again
    assert '"p -> w", 70.0 % on the valset' in again
