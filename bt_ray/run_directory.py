"""The run directory: where a sweep keeps everything, and whose it is."""

import json
import shutil
from pathlib import Path
from typing import Any

from bt_ray.config import SweepConfig
from bt_ray.errors import ConfigError
from bt_ray.results import write_json
from bt_ray.weights import Weights

IDENTITY, CONFIG, RESULT = "sweep.json", "config.json", "result.json"


def identity(config: SweepConfig, base: Weights) -> dict[str, Any]:
    """What makes two sweeps the same one: all that changes a score, but not strategies and resources."""
    settings = config.model_dump(
        mode="json",
        include={"seed", "valset_ratio", "shuffle_trainset_between_steps", "max_errors", "lm", "train"},
    )
    engine_options = config.server.engine_options
    return {"task": config.task.rpartition("/")[2], "server": engine_options, "model": base.id, **settings}


def check_run_directory(run_dir: Path, config: SweepConfig, base: Weights) -> None:
    """Raises `ConfigError` if the sweep cannot be kept in `run_dir`: not writable, or another's."""
    existing = run_dir
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise ConfigError(f"run_dir: {existing} is a file, not a directory.")
        probe = existing / f".bt_ray_probe_{id(config)}"
        probe.touch()
        probe.unlink()
        if not run_dir.exists() or not any(run_dir.iterdir()):
            return
    except OSError as error:
        raise ConfigError(f"run_dir: {existing} cannot be used ({error.strerror}).") from None
    try:
        theirs = json.loads((run_dir / IDENTITY).read_text())
    except (OSError, ValueError):
        raise ConfigError(f"run_dir: {run_dir} holds other files. Choose a new directory with --run-dir.") from None
    ours = identity(config, base)
    different = sorted(key for key in ours if ours[key] != theirs.get(key))
    if different:
        key = different[0]
        raise ConfigError(
            f"run_dir: {run_dir} is of another sweep: its {key} is {theirs.get(key)!r}, this one's {ours[key]!r}. "
            "Choose another directory with --run-dir."
        )


def prepare_run_directory(run_dir: Path, config: SweepConfig, base: Weights) -> None:
    """Make the directory the sweep's own. The best program of an earlier run is kept until it is replaced."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / RESULT).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "trials", ignore_errors=True)
    shutil.rmtree(run_dir / "tune", ignore_errors=True)
    write_json(run_dir / IDENTITY, identity(config, base))
    write_json(run_dir / CONFIG, config.without_secrets())
