"""Ray Tune's own loggers, as a sweep's settings choose them: TensorBoard's files, Weights & Biases."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from bt_ray.settings.config import TrackingConfig


def tune_loggers(tracking: TrackingConfig, run_dir: str) -> list[Any]:
    """Callbacks for Ray Tune.

    Args:
        tracking: What is chosen.
        run_dir: The sweep's run directory, whose name groups its runs.
    """
    chosen: list[Any] = []
    if tracking.tensorboard is not None:
        chosen.append(_tensorboard(Path(tracking.tensorboard) / Path(run_dir).name))
    if tracking.wandb is not None:
        chosen.append(_wandb(tracking.wandb, run_dir))
    return chosen


def _tensorboard(folder: Path) -> Any:
    from ray.tune.logger import TBXLoggerCallback
    from tensorboardX import SummaryWriter

    class Board(TBXLoggerCallback):  # type: ignore[misc]
        """Writes below a folder that stays; Ray Tune's own goes with the sweep."""

        def __init__(self) -> None:
            super().__init__()
            self._summary_writer_cls: Any = partial(_writer, SummaryWriter, folder)

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return TBXLoggerCallback, ()  # Ray Tune keeps a copy of its callbacks on disk, which nobody reads

    return Board()


def _writer(writer: Any, folder: Path, trial_folder: str, **settings: Any) -> Any:
    return writer(str(folder / Path(trial_folder).name), **settings)


def _wandb(project: str, run_dir: str) -> Any:
    from ray.air.integrations.wandb import WandbLoggerCallback

    settings = {} if "://" in run_dir else {"dir": run_dir}  # what is not uploaded yet must outlive Ray Tune's folder
    if (mode := os.environ.get("WANDB_MODE")) is not None:
        settings["mode"] = mode  # the process that speaks to it may have another environment
    return WandbLoggerCallback(project=project, group=Path(run_dir).name, excludes=["example_errors"], **settings)
