"""What the processes of a trial work with: the task with LMs wired to the pool, DSPy's settings, a folder, a log."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.actor import ActorHandle

from bt_ray.errors import StorageError
from bt_ray.layout import TRIAL_LOG
from bt_ray.run_dir.node_disk import Scratch
from bt_ray.run_dir.step_store import StepStore
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.settings.config import SweepConfig
from bt_ray.step import StepKey
from bt_ray.weights import Weights

if TYPE_CHECKING:
    from bt_ray.models import TrialModels
    from bt_ray.task.task import Task, TaskFunction
    from bt_ray.trial.failure_latch import FailureLatch
    from bt_ray.trial.program_lms import ServedModels


@dataclass(frozen=True)
class TrialSetup:
    """What every trial of a sweep needs to know, under one variant of its settings.

    Attributes:
        config: The settings.
        task: The task's spec as a worker resolves it, or its function.
        run_dir: The location of the sweep's run directory.
        keys: The key of each step, by prefix.
        places: What says where the driver found the task, as `bt_ray.task.fingerprint.find_places` gives it.
        testset: A digest of the testset; `""` without one.
        pool: The sweep's server pool; None if all LMs are APIs'.
        claims: Its step claims.
        of_the_hub: The models of the hub that it serves, by name.
    """

    config: SweepConfig
    task: "str | TaskFunction"
    run_dir: str
    keys: Mapping[str, StepKey]
    places: Mapping[str, str]
    testset: str
    pool: "ActorHandle[Any] | None"
    claims: "ActorHandle[Any]"
    of_the_hub: Mapping[str, Weights] = field(default_factory=dict)

    @property
    def store(self) -> StepStore:
        return StepStore(open_storage(self.run_dir))


@dataclass(frozen=True)
class Student:
    """A task that can be asked.

    Attributes:
        task: The task, whose program's predictors have LMs.
        models: Makes LMs of served models.
        hosted: Hosts these models.
        latch: Remembers that an answer was lost; that of the models' engine.
    """

    task: "Task"
    models: "ServedModels"
    hosted: "TrialModels"
    latch: "FailureLatch"


@contextmanager
def open_student(setup: TrialSetup, holder: str, threads: int, prefixes: Iterable[str] = ()) -> "Iterator[Student]":
    """Load the task and give its program LMs; all leases are given back at the end.

    Args:
        setup: What the trial knows.
        holder: Its name, for the pool.
        threads: Requests at a time.
        prefixes: The steps that it computes, besides the baseline.

    Raises:
        TaskError: The task is not the one that the driver made the keys of.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # LiteLLM fetches a price list otherwise

    import dspy

    from bt_ray.models import NoModels
    from bt_ray.pool.leased_models import LeasedModels
    from bt_ray.task.task import load_task
    from bt_ray.trial.failure_latch import FailureLatch
    from bt_ray.trial.lm import ServedEngine
    from bt_ray.trial.one_core import one_core
    from bt_ray.trial.program_lms import ServedModels, serving
    from bt_ray.trial.seeded_cache import draw_by_seed
    from bt_ray.trial.task_check import refuse_other_task

    config = setup.config
    hosted: TrialModels = NoModels("This sweep serves no model.")
    if setup.pool is not None:
        hosted = LeasedModels(holder, setup.pool, config)
    latch = FailureLatch()
    engine = ServedEngine(
        hosted,
        latch,
        retries=config.trial.request_retries,
        timeout_s=config.server.request_timeout_s,
        max_connections=max(100, threads),
    )
    models = ServedModels(engine, config, setup.of_the_hub)
    try:
        with one_core(), serving(models):
            task = load_task(setup.task, config.args)
            models.assign_student(task.program)
            refuse_other_task(task, setup.task, config, models.student, setup.keys, prefixes, setup.places)
            _ = dspy.cache  # opened by its first reader: else by a request, while a server waits
            with draw_by_seed(config.seed):  # last: a task may configure DSPy's cache
                yield Student(task, models, hosted, latch)
    finally:
        hosted.close()


def dspy_settings(config: SweepConfig) -> dict[str, Any]:
    """DSPy's settings for evaluations that say nothing else: those of optimizers, and of the testset."""
    names = ("num_threads", "max_errors", "provide_traceback")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


@contextmanager
def work_folder(storage: Storage, name: str) -> Iterator[Path]:
    """A folder to work in: the run directory's own on a filesystem, else a temporary one whose log goes there at the end."""
    if storage.folder is not None:
        yield storage.folder / name
        return
    with Scratch("trial") as scratch:
        try:
            yield scratch.folder
        finally:
            if (log := scratch.folder / TRIAL_LOG).exists():
                with contextlib.suppress(StorageError):  # a log that is lost costs no result
                    storage.write(f"{name}/{TRIAL_LOG}", log.read_bytes())


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Send what DSPy and bt_ray log in this process to `path` as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger("dspy"), logging.getLogger("bt_ray")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # a log that does not fit on the disk costs no result
            handler.close()
