"""Where a task's code may be: a notebook's cell, a package of the working directory, a file beside others."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT

import bt_ray
from bt_ray.driver.check import check_sweep
from bt_ray.settings.config import make_config

CELL = '''
import sys
import threading

import dspy
from dspy.teleprompt import BootstrapFinetune, LabeledFewShot

import bt_ray


class Double(dspy.Signature):
    """Double the number."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Program(dspy.Module):
    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict(Double)

    def forward(self, question):
        return self.answer(question=question)


class Demos(dspy.teleprompt.teleprompt.Teleprompter):
    def compile(self, student, *, trainset, **rest):
        return LabeledFewShot(k=2).compile(student, trainset=trainset, sample=False)


def examples(numbers):
    return [dspy.Example(question=f"number {n}", answer=str(2 * n)).with_inputs("question") for n in numbers]


def exact(example, prediction, trace=None):
    return example.answer == prediction.answer


def build(demos=True):
    program, trainset = Program(), examples(range(100, 120))
    return bt_ray.Task(
        program=program,
        trainset=trainset,
        valset=examples(range(20)),
        metric=exact,
        optimizers=lambda ctx: {"p": Demos(), "w": BootstrapFinetune(metric=exact)},
        optimizer_compile_args={"w": {"teacher": bt_ray.gold_label_teacher(program, trainset)}},
    )
'''


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code that no file holds, as a notebook does."""
    done = subprocess.run([sys.executable, "-"], input=code, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def one_server(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "strategies": ["p -> w"], "server": {**settings["server"], "count": 1, "cpus": 0.5}}


def test_a_task_of_a_notebooks_cell_runs_is_found_again_and_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    code = CELL + textwrap.dedent(f"""
        import json

        settings = json.loads({json.dumps(json.dumps(one_server(settings)))})
        result = bt_ray.sweep(build, settings)
        program = bt_ray.load(settings["run_dir"] + "/best", task=build)
        answers = [program(question="number 26").answer, program(question="number 27").answer]
        program.predictors()[0].lm.kill()
        print([c.score for c in result.candidates], result.trials[0].error, answers)
    """)
    assert run(code, tmp_path).stdout.splitlines()[-1] == "[70.0, 40.0, 20.0] None ['52', 'wrong']"
    steps = len(list(Path(settings["run_dir"], "steps").iterdir()))
    assert run(code, tmp_path).stdout.splitlines()[-1] == "[70.0, 40.0, 20.0] None ['52', 'wrong']"
    assert len(list(Path(settings["run_dir"], "steps").iterdir())) == steps, "in another process the steps are the same"


def test_what_cannot_travel_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    code = CELL + textwrap.dedent(f"""
        import json

        lock = threading.Lock()

        def locked():
            with lock:
                return build()

        try:
            bt_ray.sweep(locked, json.loads({json.dumps(json.dumps(one_server(settings)))}))
        except bt_ray.BtRayError as error:
            print(error)
    """)
    assert "__main__:locked cannot be sent to the trials" in run(code, tmp_path).stdout


def test_a_package_of_the_working_directory(settings: dict[str, Any], tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    cell, _, build = CELL.partition("def build(")
    (package / "parts.py").write_text(cell)
    (package / "task.py").write_text(f"from mine.parts import *\n\n\ndef build({build}")
    code = textwrap.dedent(f"""
        import json, bt_ray

        result = bt_ray.sweep("mine.task:build", json.loads({json.dumps(json.dumps(one_server(settings)))}))
        print([c.score for c in result.candidates], result.trials[0].error)
    """)
    assert run(code, tmp_path).stdout.splitlines()[-1] == "[70.0, 40.0, 20.0] None"
    assert bt_ray.SweepResult.read(Path(settings["run_dir"]) / "result.json").best


TOP_LEVEL = """
from tasks import *

program = dspy.Predict(Double)
teacher = {teacher}


def build():
    return double(program=program)
"""


def at_the_top(folder: Path, teacher: str) -> str:
    """A task whose program, and a teacher, stand at the top of its file."""
    (folder / "top.py").write_text(f"import sys\nsys.path.insert(0, {str(SUPPORT)!r})\n" + TOP_LEVEL.format(teacher=teacher))
    return f"{folder / 'top.py'}:build"


def test_a_program_at_the_top_of_its_file_is_new_to_each_call(settings: dict[str, Any], tmp_path: Path) -> None:
    config = {**settings, "task": at_the_top(tmp_path, "None"), "space": {"lm.temperature": [0.0, 0.5]}}
    first, again = (check_sweep(make_config(config), None) for _ in range(2))
    assert first.keys == again.keys
    assert [checked.models_at_once for checked in first.variants.values()] == [{"": 1}, {"": 1}]


def test_a_served_model_belongs_to_a_call_not_to_a_file(settings: dict[str, Any], tmp_path: Path) -> None:
    task = at_the_top(tmp_path, f"bt_ray.served({str(tmp_path)!r})")
    with pytest.raises(bt_ray.BtRayError, match=r"call it inside build\(\) or optimizers\(ctx\)"):
        check_sweep(make_config({**settings, "task": task}), None)
