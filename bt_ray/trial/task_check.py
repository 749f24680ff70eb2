"""Whether a process of a sweep has the task that the driver made the keys of: an edited file would mix two tasks' scores."""

import contextlib
import io
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import dspy

from bt_ray.errors import TaskError
from bt_ray.run_dir.run_directory import describe_changes
from bt_ray.settings.config import SweepConfig
from bt_ray.step import StepKey
from bt_ray.strategy import BASELINE
from bt_ray.task.fingerprint import digest, find_differences, find_places, step_keys
from bt_ray.task.task import StepContext, Task, TaskFunction, step_seed, task_spec
from bt_ray.trial.lm import student_lm
from bt_ray.weights import Weights


def refuse_other_task(
    task: Task,
    source: str | TaskFunction,
    config: SweepConfig,
    base: Weights | None,
    keys: Mapping[str, StepKey],
    prefixes: Iterable[str],
    places: Mapping[str, str],
) -> None:
    """Raises `TaskError` if a task that was loaded is not the one that the driver loaded; it says what differs.

    Args:
        task: The task as it was loaded here, with LMs.
        source: Where it is from.
        config: The sweep's settings.
        base: The weights of the sweep's model, likewise.
        keys: The driver's keys, by prefix.
        prefixes: The steps that this process computes, each after its parent.
        places: The driver's, as `find_places` gives them.
    """
    prefixes = list(prefixes)
    places = {**find_places(source), **places} if isinstance(source, str) else places
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):

        def context(prefix: str) -> StepContext:
            return StepContext(prefix, step_seed(config.seed, prefix), Path(scratch), student_lm(task.program))

        found = step_keys(task, config, base, prefixes, context, places)
    parts: set[str] = set()
    named: set[str] = set()
    for prefix in (BASELINE, *prefixes):
        differing, reached = find_differences(keys[prefix], found[prefix], sent=not isinstance(source, str))
        parts.update(differing)
        named.update(reached)
    if parts:
        raise _refusal(source, describe_changes(parts, named))


def refuse_other_testset(source: str | TaskFunction, testset: list[dspy.Example], expected: str) -> None:
    """Raises `TaskError` if a testset is not the one with the digest that the driver found."""
    if digest(testset) != expected:
        raise _refusal(source, "testset")


def _refusal(source: str | TaskFunction, differs: str) -> TaskError:
    spec = source if isinstance(source, str) else task_spec(source)
    return TaskError(
        f"The task {spec} is not here what it was when the sweep started. What differs: {differs}. Either a file was edited "
        "meanwhile, or build() does not give the same in each process: it draws at random without a seed, reads a clock, or "
        "uses what the driver alone has, such as dspy.configure outside of the task's file. Nothing was computed with it. "
        "Run the same command again: finished steps that the change does not concern are kept."
    )
