"""Programs on disk: save a candidate's state, keep the best of a sweep, load it again to answer.

A program is kept as DSPy's JSON state without LMs; beside it stands which weights each predictor uses. No pickle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from bt_ray.errors import BtRayError, ConfigError, TaskError
from bt_ray.layout import BEST, BEST_MANIFEST, BEST_PROGRAM, WEIGHTS
from bt_ray.location import parent_and_name
from bt_ray.models import Models
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
from bt_ray.winner.local_models import LocalModels
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
    """The best program of a sweep, as it lies in its run directory.

    Attributes:
        storage: The run directory.
        name: Of the folder in it.
        manifest: What `keep_best` wrote.
        config: The settings that it was computed under.
        weights: Those of its predictors with served LMs, by id.
    """

    storage: Storage
    name: str
    manifest: Mapping[str, Any]
    config: SweepConfig
    weights: Mapping[str, Weights]

    @property
    def program(self) -> bytes:
        """DSPy's JSON state of it."""
        return StepStore(self.storage).read_program(f"{self.name}/{BEST_PROGRAM}")


def find_best(folder: str | Path) -> Kept:
    """The best program of a sweep.

    Args:
        folder: A sweep's run directory, or its `best` folder: a path, or a URI of an object store.

    Raises:
        BtRayError: The folder holds no finished program, or what it refers to is gone.
    """
    location = str(folder) if "://" in str(folder) else str(Path(folder).expanduser().resolve())
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
    return Kept(storage, name, manifest, config, weights)


def load(
    folder: str | Path,
    task: str | TaskFunction | None = None,
    *,
    served_at: str | Sequence[str] | None = None,
    token: str | None = None,
) -> dspy.Module:
    """The best program of a sweep, ready to answer.

    Its model server starts on this machine with the first request, and ends with this process, or with
    `program.predictors()[0].lm.kill()`.

    Args:
        folder: A sweep's run directory, or its `best` folder: a path, or a URI of an object store.
        task: Where the task is now, `"path/to/task.py:build"`, or its function, if it is no longer where the sweep found it:
            a job's working directory, for one, goes away with the job.
        served_at: The address of `bt-ray serve`, or several, to be asked in place of a server of this process's own.
        token: The token that it printed.

    Raises:
        BtRayError: The folder holds no finished program, or what it refers to is gone.
    """
    kept = find_best(folder)
    hosted: Models = LocalModels(dict(kept.weights), kept.config.server, kept.storage)
    if served_at is not None:
        hosted = RemoteModels([served_at] if isinstance(served_at, str) else served_at, token or "", list(kept.weights))
    models = ServedModels(_engine(hosted, kept.config), kept.config, find_hub_models(kept.weights.values()))
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
