"""`bt-ray check`: each thing that is wrong ends in seconds with one clear message and exit code 2."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import SUPPORT
from typer.testing import CliRunner

from bt_ray.cli import app

TASK = """
import dspy
import bt_ray
from dspy.teleprompt import GEPA, BootstrapFewShot, BootstrapFinetune
from support import tasks

def build():
    return tasks.double({arguments})
"""


class Checked:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {"task": "task.py:build", "model": str(model), "strategies": ["p -> w"]}
        self.arguments = ""
        self.options: list[str] = []

    def write(self, text: str | None = None) -> None:
        (self.folder / "task.py").write_text(TASK.format(arguments=self.arguments))
        toml = "\n".join(f"{key} = {toml_value(value)}" for key, value in self.values.items()) if text is None else text
        (self.folder / "sweep.toml").write_text(toml)

    def run(self, *options: str, text: str | None = None, file: str = "sweep.toml") -> Result:
        """The command in this process: one of its own would import for 2 s what this one has."""
        self.write(text)
        with contextlib.chdir(self.folder):
            return CliRunner().invoke(app, ["check", file, *options])

    def run_alone(self, file: str = "sweep.toml") -> subprocess.CompletedProcess[str]:
        """The command as a user starts it."""
        env = {**os.environ, "PYTHONPATH": str(SUPPORT.parent)}
        command = [sys.executable, "-m", "bt_ray.cli", "check", file]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=self.folder, check=False)

    def refused(self, *options: str, **how: str) -> str:
        """The message of a check that must fail."""
        done = self.run(*options, **how)
        assert done.exit_code == 2, done.output
        assert isinstance(done.exception, SystemExit), "and no traceback"
        assert done.stderr.startswith("error: ")
        return done.stderr


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value).replace("'", '"')


@pytest.fixture
def check(tmp_path: Path, model: Path) -> Checked:
    (tmp_path / "sweep").mkdir()
    return Checked(tmp_path / "sweep", model)


def test_a_good_sweep_passes_and_says_what_it_would_do(check: Checked) -> None:
    check.write()
    done = check.run_alone()
    assert done.returncode == 0, done.stderr
    assert "p = Demos, w = BootstrapFinetune, bad = Failing" in done.stdout
    assert "20 to train, 20 to validate, 20 to test" in done.stdout
    assert not (check.folder / "runs").exists(), "a check leaves nothing behind"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategies": ["p -> q"]}, "no optimizer 'q'"),
        ({"strategies": [""]}, "A strategy is empty"),
        ({"strategies": ["p->w"]}, 'write "p -> w"'),
        ({"stratgies": ["p"]}, "unknown key 'stratgies'. Did you mean 'strategies'?"),
        ({"valset_ratio": 1}, "valset_ratio: Input should be less than 1"),
        ({"task": "nowhere.py:build"}, "nowhere.py does not exist"),
        ({"task": "task.py:biuld"}, "has no function 'biuld'. Did you mean 'build'?"),
        ({"model": "/no/such/model"}, "the folder /no/such/model does not exist"),
        ({"server": {"gpus": 0.5}}, "A slot with 0.5 of a GPU only serves"),
        ({"server": {"gpus": 8}}, "train.batch_size = 4 cannot be shared out over the 8 GPUs of a slot"),
    ],
    ids=str,
)
def test_wrong_settings(check: Checked, values: dict[str, Any], message: str) -> None:
    check.values |= values
    assert message in check.refused()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trainset=[]", "trainset is empty"),
        ("metric='accuracy'", "the metric cannot be called"),
        ("program=type('Empty', (dspy.Module,), {})()", "the program has no predictors"),
        ("optimizers={'p': tasks.Demos(), 'w': tasks.Demos()}", "write `optimizers=lambda ctx: {...}`"),
        (
            "optimizers=lambda ctx: {'p': GEPA(tasks.exact, auto='light', reflection_lm=ctx.lm), 'w': tasks.Demos()}, "
            "optimizer_compile_args={'p': {'teacher': dspy.Predict(tasks.Double)}}",
            "GEPA takes no teacher",
        ),
        (
            "optimizers=lambda ctx: {'p': GEPA(tasks.exact, auto='light', reflection_lm=ctx.lm), 'w': tasks.Failing()}, "
            "optimizer_compile_args={}, teacher=dspy.Predict(tasks.Double)",
            "no optimizer of the strategies takes one",
        ),
        ("optimizer_compile_args={'w': {'epochs': 3}}", "BootstrapFinetune.compile() takes no 'epochs'"),
        ("optimizer_compile_args={'w': {'student': 3}}", "BetterTogether passes the student itself"),
        ("optimizer_compile_args={'x': {}}", "optimizer_compile_args has key 'x'"),
        ("trainset=[dspy.Example(question='number 1', answer='2')], optimizer_compile_args={}", "add `.with_inputs(...)`"),
        ("optimizers=lambda ctx: 1 / 0", "optimizers(ctx) raised ZeroDivisionError"),
        ("optimizers=lambda ctx: {'p': ctx.lm('hello')}", "build() and optimizers(ctx) must not ask a served LM"),
        ("valset=None", "so nothing to rank 2 strategies by"),
    ],
)
def test_wrong_tasks(check: Checked, arguments: str, message: str) -> None:
    check.arguments = arguments
    if "valset" in arguments:
        check.values |= {"strategies": ["p", "w"], "valset_ratio": 0}
    assert message in check.refused()


def test_a_missing_file_and_broken_toml(check: Checked) -> None:
    assert "not valid TOML" in check.refused(text="strategies = [")
    (check.folder / "latin1.toml").write_bytes("task = 'gr\u00fc\u00dfe'".encode("latin1"))
    assert "it is not UTF-8" in check.refused("--set", "seed=1", file="latin1.toml")
    (check.folder / "sweep.toml").unlink()
    done = check.run_alone("none.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "none.toml: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_directory_that_cannot_be_written(check: Checked) -> None:
    assert "cannot be used" in check.refused("--run-dir", "/proc/bt_ray_run")
    assert "cannot be used (File name too long)" in check.refused("--run-dir", "x" * 300)
    (check.folder / "file").write_text("")
    assert "is a file" in check.refused("--run-dir", "file")


def test_a_run_directory_of_another_sweep(check: Checked, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "holds other files" in check.refused("--run-dir", str(other))
    (other / "sweep.json").write_text('{"task": "another.py:build"}')
    assert "is of another sweep" in check.refused("--run-dir", str(other))


def test_a_job_refuses_relative_paths(check: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "A job's working directory is a copy that goes away" in check.refused("--run-dir", "runs/today")
    assert check.run("--run-dir", str(check.folder / "runs")).exit_code == 0
