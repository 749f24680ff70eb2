"""bt_ray runs DSPy BetterTogether strategy sweeps on a Ray cluster.

What a user needs is here; everything is imported on first use, so that `import bt_ray` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bt_ray.driver.sweep import sweep
    from bt_ray.errors import BtRayError
    from bt_ray.run_dir.results import Candidate, SweepResult, TrialResult
    from bt_ray.settings.config import SweepConfig
    from bt_ray.settings.toml import load_config
    from bt_ray.task.task import StepContext, Task
    from bt_ray.task.teachers import gold_label_teacher
    from bt_ray.trial.program_lms import served
    from bt_ray.winner.load import load

_HOME = {
    "BtRayError": "errors",
    "Candidate": "run_dir.results",
    "StepContext": "task.task",
    "SweepConfig": "settings.config",
    "SweepResult": "run_dir.results",
    "Task": "task.task",
    "TrialResult": "run_dir.results",
    "gold_label_teacher": "task.teachers",
    "load": "winner.load",
    "load_config": "settings.toml",
    "served": "trial.program_lms",
    "sweep": "driver.sweep",
}

__all__ = [
    "BtRayError",
    "Candidate",
    "StepContext",
    "SweepConfig",
    "SweepResult",
    "Task",
    "TrialResult",
    "gold_label_teacher",
    "load",
    "load_config",
    "served",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bt_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bt_ray.{_HOME[name]}"), name)
