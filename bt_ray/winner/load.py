"""Programs on disk: keep the best of a sweep, and load it, or another candidate, again to answer.

A program is kept as DSPy's JSON state without LMs; beside it stands which weights each predictor uses. No pickle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from bt_ray.errors import BtRayError, ConfigError, TaskError
from bt_ray.layout import BEST, BEST_MANIFEST, BEST_PROGRAM, SWEEP, WEIGHTS
from bt_ray.location import parent_and_name
from bt_ray.models import Models
from bt_ray.run_dir.candidates import find_candidate, read_bases
from bt_ray.run_dir.node_disk import Scratch
from bt_ray.run_dir.results import Candidate
from bt_ray.run_dir.step_store import StepStore
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.task.task import TaskFunction, load_task
from bt_ray.trial.lm import ServedEngine
from bt_ray.trial.program_lms import ServedModels, assign_versions, serving
from bt_ray.trial.program_state import load_state
from bt_ray.trial.steps import read_installed_versions
from bt_ray.weights import Weights, find_hub_models
from bt_ray.winner.local_models import open_local_models
from bt_ray.winner.remote_models import RemoteModels


def keep_best(best: Candidate, storage: Storage, bases: Mapping[str, Weights], config: SweepConfig, task: str) -> None:
    """Write `best/` into the run directory: the program, a reference to its weights, and last a manifest."""
    weights = {id_: bases[id_].path if id_ in bases else f"../{WEIGHTS}/{id_}" for id_ in best.weights.values()}
    manifest = {
        "task": task,
        "strategy": best.strategy,
        "prefix": best.prefix,
        "variant": best.variant,
        "step": Path(best.program).parts[1],
        "score": best.score,
        "predictors": best.weights,
        "api_models": best.api_models,
        "weights": weights,
        "revisions": {id_: bases[id_].revision for id_ in weights if id_ in bases and bases[id_].revision is not None},
        "config": config.without_secrets(),
        "versions": read_installed_versions(),
    }
    with Scratch("best") as scratch:
        folder = scratch.folder / BEST
        folder.mkdir()
        (folder / BEST_PROGRAM).write_bytes(StepStore(storage).read_program(best.program))
        (folder / BEST_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        storage.upload(folder, BEST, last=BEST_MANIFEST)


@dataclass(frozen=True)
class Kept:
    """The best program of a sweep, or another candidate, as it lies in its run directory.

    Attributes:
        storage: The run directory.
        file: DSPy's JSON state of the program, relative to it.
        manifest: What `keep_best` wrote, or would write.
        config: The settings that it was computed under.
        weights: Those of its predictors with served LMs, by id.
    """

    storage: Storage
    file: str
    manifest: Mapping[str, Any]
    config: SweepConfig
    weights: Mapping[str, Weights]

    @property
    def program(self) -> bytes:
        """DSPy's JSON state of it."""
        return StepStore(self.storage).read_program(self.file)


def find_best(folder: str | Path) -> Kept:
    """The best program of a sweep.

    Args:
        folder: A sweep's run directory, or its `best` folder: a path, or a URI of an object store.

    Raises:
        BtRayError: The folder holds no finished program, or what it refers to is gone.
    """
    location = _location(folder)
    storage, name = open_storage(location), BEST
    manifest = storage.read_json(f"{name}/{BEST_MANIFEST}")
    if manifest is None:
        run_dir, name = parent_and_name(location)
        storage = open_storage(run_dir)
        manifest = storage.read_json(f"{name}/{BEST_MANIFEST}")
    if manifest is None:
        raise ConfigError(f"{folder} is neither a run directory with a best program nor its `best` folder.")
    config = make_config(manifest["config"], source=f"{folder}/{BEST_MANIFEST}")
    commits = manifest.get("revisions", {})
    weights = {id_: _find_weights(storage, id_, path, commits.get(id_)) for id_, path in manifest["weights"].items()}
    return Kept(storage, f"{name}/{BEST_PROGRAM}", manifest, config, weights)


def find_program(folder: str | Path, candidate: str | Candidate | None = None) -> Kept:
    """The best program of a sweep, or, if one is named, another candidate.

    Args:
        folder: A sweep's run directory, or its `best` folder: a path, or a URI of an object store.
        candidate: The candidate, or its name.

    Raises:
        BtRayError: There is no such program, or what it refers to is gone.
    """
    if candidate is None:
        return find_best(folder)
    storage = open_storage(_location(folder))
    if storage.read_json(SWEEP) is None:
        above, name = parent_and_name(storage.location)
        storage = open_storage(above) if name == BEST else storage
    found = find_candidate(storage, candidate if isinstance(candidate, str) else candidate.name)
    step = found.step
    manifest = {
        "task": found.config.task,
        "strategy": step.prefix,
        "prefix": step.prefix,
        "variant": found.variant,
        "step": step.key,
        "score": step.score,
        "predictors": step.weights,
        "api_models": step.api_models,
        "versions": step.versions,
    }
    return Kept(storage, step.program, manifest, found.config, found.weights)


def _location(folder: str | Path) -> str:
    return str(folder) if "://" in str(folder) else str(Path(folder).expanduser().resolve())


def load(
    folder: str | Path,
    task: str | TaskFunction | None = None,
    *,
    candidate: str | Candidate | None = None,
    served_at: str | Sequence[str] | None = None,
    token: str | None = None,
) -> dspy.Module:
    """The best program of a sweep, or another candidate, ready to answer.

    Its model server starts on this machine with the first request, and ends with this process, or with
    `program.predictors()[0].lm.kill()`. Programs of one run directory share a server for each base model: it goes from the
    weights of one to those of another as they ask.

    Args:
        folder: A sweep's run directory, or its `best` folder: a path, or a URI of an object store.
        task: Where the task is now, `"path/to/task.py:build"`, or its function, if it is no longer where the sweep found it:
            a job's working directory, for one, goes away with the job.
        candidate: Which one, if not the best: its name, `"p -> w"`, `"baseline"`, under a variant `"p [seed=1]"`, or one of
            a result's `candidates`.
        served_at: The address of `bt-ray serve`, or several, to be asked in place of a server of this process's own.
        token: The token that it printed.

    Raises:
        BtRayError: The folder holds no finished program, or what it refers to is gone.
    """
    kept = find_program(folder, candidate)
    hosted: Models = open_local_models(kept.weights, kept.config.server, kept.storage)
    if served_at is not None:
        hosted = RemoteModels([served_at] if isinstance(served_at, str) else served_at, token or "", list(kept.weights))
    known = find_hub_models([*read_bases(kept.storage).values(), *kept.weights.values()])
    models = ServedModels(_engine(hosted, kept.config), kept.config, known)
    with serving(models):
        program = _load_program(task or kept.manifest["task"], kept.config.args)
    api_models = kept.manifest.get("api_models", {})
    assign_versions(program, kept.manifest["predictors"], api_models, models, kept.weights.__getitem__)
    load_state(program, kept.program)
    return program


def _load_program(task: str | TaskFunction, args: Mapping[str, Any]) -> dspy.Module:
    try:
        return load_task(task, args).program
    except TaskError as error:
        raise TaskError(f'{error} If the task is elsewhere now: bt_ray.load(..., task="path/to/task.py:build").') from error


def _engine(models: Models, config: SweepConfig) -> ServedEngine:
    return ServedEngine(
        models,
        None,
        retries=config.trial.request_retries,
        timeout_s=config.server.request_timeout_s,
        max_connections=max(100, config.num_threads),
    )


def _find_weights(storage: Storage, weights_id: str, path: str, revision: str | None) -> Weights:
    """The weights of a manifest. Those of the sweep are kept relative to `best`, so that a run directory can move."""
    if path.startswith(".."):
        return StepStore(storage).read_weights(weights_id)
    if Path(path).is_absolute() and not Path(path).exists():
        raise BtRayError(f"The model {path} that the sweep started from is gone.")
    return Weights(weights_id, path, revision=revision)
