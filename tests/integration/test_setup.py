"""`scripts/setup.sh` stops with a clear message, and does nothing when nothing changed. Its tools are stand-ins here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

GOOD_PYTHON = """#!/bin/sh
case "$*" in
    --version) echo "Python 3.11.7" ;;
    *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *--dry-run*) echo "Would install torch-2.13.0+cpu" ;;
    *"import torch"*) exit 1 ;;
esac
echo "$*" >> calls
"""
OLD_PYTHON = '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n'


class Clone:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir()
        (folder / "bin").mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        self.stand_in("python", GOOD_PYTHON)

    def stand_in(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(script)
        path.chmod(0o755)

    def setup(self) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHON": str(self.folder / "bin" / "python")}
        env["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{env['PATH']}"
        command = ["bash", str(self.folder / "scripts" / "setup.sh")]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_each_stage_is_one_line_and_the_second_time_does_nothing(clone: Clone) -> None:
    first = clone.setup()
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 4
    assert all(line.startswith("==> ") for line in first.stdout.splitlines())
    assert any("install" in call and "torch==2.13.0" in call for call in clone.calls)
    before = clone.calls
    second = clone.setup()
    assert (second.returncode, second.stdout) == (0, "")
    assert clone.calls == before
    (clone.folder / "constraints.txt").write_text("changed")
    assert clone.setup().stdout != ""


def test_an_old_python_is_refused(clone: Clone) -> None:
    clone.stand_in("python", OLD_PYTHON)
    done = clone.setup()
    assert done.returncode == 1
    assert "Python 3.9.2 does not fit: bt_ray needs 3.11, 3.12 or 3.13. Set PYTHON" in done.stderr


def test_a_full_disk_is_told(clone: Clone) -> None:
    clone.stand_in("df", "#!/bin/sh\necho Avail\necho 1048576\n")
    done = clone.setup()
    assert done.returncode == 1
    assert "1 GiB are free here; the environment and the model need 8 GiB." in done.stderr


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ERROR: No matching distribution found for torch", "a package could not be downloaded: is there a network"),
        ("Failed to establish a new connection", "a package could not be downloaded: is there a network"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("something else", "pip failed; its whole output is in .venv/pip.log."),
    ],
)
def test_a_failed_download_is_told_and_tried_again_the_next_time(clone: Clone, output: str, message: str) -> None:
    failing = GOOD_PYTHON.replace('echo "$*" >> calls', f'case "$*" in *"--quiet"*) echo "{output}"; exit 1 ;; esac')
    clone.stand_in("python", failing)
    done = clone.setup()
    assert done.returncode == 1
    assert message in done.stderr
    clone.stand_in("python", GOOD_PYTHON)
    shutil.rmtree(clone.folder / ".venv")
    assert clone.setup().returncode == 0


def test_where_the_plain_pin_would_bring_cuda_the_cpu_index_is_asked(clone: Clone) -> None:
    clone.stand_in("python", GOOD_PYTHON.replace("torch-2.13.0+cpu", "torch-2.13.0 nvidia-cudnn"))
    assert clone.setup().returncode == 0
    assert any("--index-url" in call and "torch==2.13.0" in call for call in clone.calls)
