"""Programs on disk: save a candidate's state, keep the best of a sweep, load it again to answer.

A program is kept as DSPy's JSON state without LMs; beside it stands which weights each predictor uses. No pickle.
"""

import json
import shutil
from pathlib import Path

import dspy

from bt_ray.config import SweepConfig, make_config
from bt_ray.errors import BtRayError, ConfigError, TaskError
from bt_ray.kept_steps import installed_versions, load_state
from bt_ray.lm import ServedEngine, ServedLM, served_lm
from bt_ray.local_models import LocalModels
from bt_ray.results import Candidate
from bt_ray.task import load_task
from bt_ray.weights import Weights

PROGRAM, MANIFEST = "program.json", "manifest.json"


def keep_best(best: Candidate, run_dir: Path, base: Weights, config: SweepConfig, task: str) -> None:
    """Write `run_dir/best`: the program, a reference to its weights, and a manifest. The folder appears whole."""
    folder, part = run_dir / "best", run_dir / ".best.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    shutil.copyfile(run_dir / best.program, part / PROGRAM)
    fine_tuned = {i: f"../weights/{i}" for i in set(best.weights.values()) if i != base.id}
    manifest = {
        "task": task,
        "strategy": best.strategy,
        "prefix": best.prefix,
        "score": best.score,
        "predictors": best.weights,
        "weights": {base.id: base.path, **fine_tuned},
        "config": config.without_secrets(),
        "versions": installed_versions(),
    }
    (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load(folder: str | Path, task: str | None = None) -> dspy.Module:
    """The best program of a sweep, ready to answer.

    Its model server starts on this machine with the first request, and ends with this process, or with
    `program.predictors()[0].lm.kill()`.

    Args:
        folder: A sweep's `best` folder.
        task: Where the task is now, `"path/to/task.py:build"`, if it is no longer where the sweep found it: a job's working
            directory, for one, goes away with the job.

    Raises:
        BtRayError: The folder holds no finished program, or what it refers to is gone.
    """
    folder = Path(folder).resolve()
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no {MANIFEST}: it is no finished `best` folder of a sweep.") from None
    config = make_config(manifest["config"], source=str(folder / MANIFEST))
    program = _load_program(task or manifest["task"])
    weights = {i: Weights(i, _locate(folder, path)) for i, path in manifest["weights"].items()}
    models = LocalModels(weights, config.server, folder.parent / "logs")
    lms = local_lms(models, weights, config)
    for name, predictor in program.named_predictors():
        if name in manifest["predictors"]:
            predictor.lm = lms[manifest["predictors"][name]]
    load_state(program, (folder / PROGRAM).read_bytes())
    return program


def _load_program(task: str) -> dspy.Module:
    try:
        return load_task(task).program
    except TaskError as error:
        raise TaskError(f'{error} If the task is elsewhere now: bt_ray.load(..., task="path/to/task.py:build").') from error


def local_lms(models: LocalModels, weights: dict[str, Weights], config: SweepConfig) -> dict[str, ServedLM]:
    engine = ServedEngine(
        models,
        None,
        retries=config.trial.request_retries,
        timeout_s=config.server.request_timeout_s,
        max_connections=max(100, config.num_threads),
    )
    return {weights_id: served_lm(version_, engine, config.lm) for weights_id, version_ in weights.items()}


def _locate(folder: Path, path: str) -> str:
    """Weights of the sweep are kept relative to `best`, so that a run directory can move."""
    located = (folder / path).resolve() if path.startswith("..") else Path(path)
    if located.is_absolute() and not located.exists():
        raise BtRayError(f"The weights {located} that {folder} refers to are gone.")
    return str(located)
