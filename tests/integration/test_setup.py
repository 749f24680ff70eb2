"""`scripts/setup.sh` stops with a clear message, and does nothing when nothing changed. Its tools are stand-ins here."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_list_is_installed_as_it_is(clone: Clone) -> None:
    assert clone.setup().returncode == 0
    assert any("--no-deps --requirement constraints.txt" in call for call in clone.calls)
    assert any("--no-deps --no-build-isolation --editable ." in call for call in clone.calls)
    assert not any("--constraint" in call or "uninstall" in call for call in clone.calls)


def test_another_python_than_that_of_the_list_has_its_versions_resolved(clone: Clone) -> None:
    clone.stand_in("python", GOOD_PYTHON.replace('*"import torch"*', '*"import platform"* | *"import torch"*'))
    assert clone.setup().returncode == 0
    assert any("--constraint constraints.txt --editable .[cpu,dev]" in call for call in clone.calls)
    assert any("uninstall" in call and "torchvision torchaudio torchcodec" in call for call in clone.calls)
    assert not any("--requirement" in call for call in clone.calls)


@pytest.mark.skipif(
    (sys.version_info[:2], platform.machine()) != ((3, 11), "x86_64"), reason="constraints.txt is of Python 3.11 on x86-64"
)
def test_the_list_has_a_fitting_version_of_each_package_that_is_asked_for_and_nothing_else() -> None:
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    version = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    version["torch"] += "+cpu"  # the build that setup.sh takes
    (names,) = re.findall(r"^LEFT_OUT=\((.+)\)$", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    asked = requirements_of_the_environment(left_out=set(names.split()))
    assert [str(one) for one in asked if not one.specifier.contains(version.get(canonicalize_name(one.name), "0"))] == []
    assert {canonicalize_name(one.name) for one in asked} == version.keys()


def requirements_of_the_environment(left_out: set[str]) -> list[Requirement]:
    """All that `bt-ray[cpu,dev]` asks for, and what that asks for, as the packages that are installed here say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    waiting = [Requirement(line) for line in project["build-system"]["requires"] + project["project"]["dependencies"]]
    waiting.append(Requirement("bt-ray[cpu,dev]"))
    asked, seen = [], set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name in left_out or str(one) in seen:
            continue
        seen.add(str(one))
        if name == "bt-ray":
            waiting += [Requirement(line) for extra in one.extras for line in extras[extra]]
            continue
        asked.append(one)
        for line in requires(one.name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                waiting.append(needed)
    return asked


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
