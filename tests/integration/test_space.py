"""Sweeps whose settings vary: steps are shared wherever what they depend on is equal."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT
from support.scripted_model import write_model
from support.sweep_files import toml

import bt_ray

pytestmark = pytest.mark.usefixtures("local_ray")

TASK = """
from tasks import *


def build(demos=2):
    def optimizers(ctx):
        return {"p": Demos(demos), "w": BootstrapFinetune(metric=exact)}

    return double(optimizers=optimizers)
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    shutil.copy(SUPPORT / "tasks.py", tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    return f"{tmp_path / 'task.py'}:build"


def best_scores(result: bt_ray.SweepResult) -> dict[str, float | None]:
    assert [trial.error for trial in result.trials] == [None] * len(result.trials)
    return {
        f"{trial.strategy} {list(trial.settings.values())}": trial.best.score if trial.best else None
        for trial in result.trials
    }


def test_an_optimizers_argument_varies_and_the_steps_without_it_are_shared(settings: dict[str, Any], task: str) -> None:
    space = {"args.demos": [1, 3]}
    result = bt_ray.sweep(task, {**settings, "strategies": ["p", "w -> p", "w"], "space": space})
    assert best_scores(result) == {
        "p [1]": 30.0,
        "w -> p [1]": 60.0,
        "w [1]": 50.0,
        "p [3]": 50.0,
        "w -> p [3]": 80.0,
        "w [3]": 50.0,
    }
    run_dir = Path(settings["run_dir"])
    assert len(list((run_dir / "steps").iterdir())) == 1 + 1 + 2 + 2, "baseline, w; p and w -> p for each"
    assert len(list((run_dir / "weights").iterdir())) == 1
    assert result.best is not None
    assert (result.best.variant, result.best.prefix) == ("args.demos=3", "w -> p")
    best = bt_ray.load(run_dir / "best")
    assert best(question="number 27").answer == "54"
    named = {
        name: bt_ray.load(run_dir, candidate=name) for name in ("p [args.demos=1]", "w [args.demos=3]", "p [args.demos=3]")
    }
    assert {name: len(program.demos) for name, program in named.items()} == dict(zip(named, [1, 0, 3], strict=True))
    assert named["p [args.demos=3]"](question="number 24").answer == "48"
    with pytest.raises(bt_ray.BtRayError, match=r'no candidate "p"\. .*Its candidates: "baseline \[args\.demos=1\]", '):
        bt_ray.load(run_dir, candidate="p")
    best.lm.kill()

    again = bt_ray.sweep(task, {**settings, "strategies": ["p", "w"], "space": {"args.demos": [1, 2, 3]}})
    assert best_scores(again)["p [2]"] == 40.0
    assert len(list((run_dir / "steps").iterdir())) == 6 + 1, "one step is new"


def test_models_and_training_settings_vary(settings: dict[str, Any], task: str, tmp_path: Path) -> None:
    write_model(tmp_path / "other", skill=4)
    space = {"model": [settings["model"], str(tmp_path / "other")], "train.learning_rate": [1e-4, 2e-4]}
    result = bt_ray.sweep(task, {**settings, "strategies": ["w", "p"], "space": space})
    found = best_scores(result)
    assert sorted(found.values(), key=float) == [40.0, 40.0, 50.0, 50.0, 60.0, 60.0, 70.0, 70.0]
    run_dir = Path(settings["run_dir"])
    assert len(list((run_dir / "steps").iterdir())) == 2 * (1 + 1 + 2), "for each model: baseline, p, and w for each rate"
    assert len(list((run_dir / "weights").iterdir())) == 4


def test_the_commands_show_seeds_and_what_they_share(settings: dict[str, Any], task: str, tmp_path: Path) -> None:
    server = {**settings["server"], "cpus": 0.5}
    values = {**settings, "task": task, "strategies": ["p", "w"], "space": {"seed": [0, 1]}, "server": server}
    values["lm"] = {"temperature": 0.5}
    (tmp_path / "sweep.toml").write_text(toml(values))

    def command(name: str, *arguments: str) -> str:
        line = [sys.executable, "-m", "bt_ray.cli", name, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = str(tmp_path / "sweep.toml")
    assert "variants   2: seed=0; seed=1" in command("check", file)
    assert "4 steps and 2 baselines, shared between strategies; one by one: 4 and 4." in command("plan", file)
    output = command("sweep", file)
    assert "p [seed=0]" in output
    assert "Best scores over seeds, in percent" in output
    assert 'Best program: "w" with seed=0, 50.0 % on the valset.' in output
    listed = command("steps", settings["run_dir"])
    asked = re.findall(r"baseline \[seed=(.)\]: 20.0 % in \d+ s, (\d+) requests", listed)
    assert asked == [("0", "20"), ("1", "20")], "each seed draws its own answers"
    assert "w [seed=1]: 50.0 %" in listed
    assert "Nothing is left to compute." in command("plan", file)


@pytest.mark.long
def test_all_strategies_up_to_a_length(settings: dict[str, Any], task: str) -> None:
    result = bt_ray.sweep(task, {**settings, "strategies": "all(max_length = 2)"})
    assert [trial.strategy for trial in result.trials] == ["p", "w", "p -> p", "p -> w", "w -> p", "w -> w"]
    assert result.best is not None
    assert (result.best.prefix, result.best.score) == ("w -> w", 80.0)


def test_what_the_task_does_not_take_is_told(settings: dict[str, Any], task: str) -> None:
    with pytest.raises(bt_ray.BtRayError, match=r"does not take the arguments \['demoz'\] of \[args\]"):
        bt_ray.sweep(task, {**settings, "space": {"args.demoz": [1]}})
