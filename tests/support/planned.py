"""The keys of tasks that are written as texts, planned in this process, of which no folder, module or setting stays."""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspy.dsp.utils.settings import main_thread_config

from bt_ray.driver.check import check_sweep
from bt_ray.settings.config import make_config
from bt_ray.step import StepKey

HEAD = """
import dspy
from dspy.teleprompt import BootstrapFewShotWithRandomSearch, BootstrapFinetune
import bt_ray

LM = dspy.LM("openai/gpt-x", api_key="none")
"""
PROGRAM = """
def program():
    return dspy.Predict("question -> answer")
"""
METRIC = """
def metric(example, prediction, trace=None):
    return example.answer == prediction.answer
"""
BUILD = """

def examples():
    return [dspy.Example(question=f"q{n}", answer=str(n)).with_inputs("question") for n in range(20)]


def optimizers(ctx):
    return {
        "p": BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=2),
        "w": BootstrapFinetune(metric=metric),
    }


def build():
    made = program()
    made.set_lm(LM)
    return bt_ray.Task(program=made, trainset=examples(), metric=metric, optimizers=optimizers)
"""


def keys_of(files: Mapping[str, str], **settings: Any) -> dict[str, StepKey]:
    """The key of each step of `"p"` and `"w"`, of a task in `task.py`, by prefix."""
    with alone() as folder:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        values = {"task": f"{folder}/task.py:build", "strategies": ["p", "w"], **settings}
        return check_sweep(make_config(values), None).first.keys


@contextmanager
def alone() -> Iterator[Path]:
    """A new folder, of which nothing stays: no file, no module, no setting."""
    modules, path, config = set(sys.modules), list(sys.path), dict(main_thread_config)
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        for name in set(sys.modules) - modules:
            module = sys.modules[name]
            places = [vars(module).get("__file__"), *(vars(module).get("__path__") or ())]
            if any(place is not None and Path(place).is_relative_to(folder) for place in places):
                del sys.modules[name]
        sys.path[:] = path
        sys.path_importer_cache.clear()
        main_thread_config.clear()
        main_thread_config.update(config)
