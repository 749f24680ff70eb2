"""A finished sweep of one strategy, made in this process alone: a real run directory, real child processes, no Ray."""

from pathlib import Path
from typing import Any

import bt_ray
from bt_ray.driver.check import check_sweep
from bt_ray.driver.sweep import run_sweep, variant_steps
from bt_ray.run_dir.run_directory import prepare_run_directory
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import make_config
from bt_ray.task.task import load_task
from bt_ray.trial.better_together import SweepBetterTogether
from bt_ray.trial.evaluation import LocalEvaluator
from bt_ray.trial.lm import assign_lm
from support.slot_models import SlotModels
from support.sole_claims import OwnSteps


def sole_sweep(settings: dict[str, Any], strategy: str) -> bt_ray.SweepResult:
    """Run the sweep of these settings on one strategy of a task without a testset."""
    config = make_config({**settings, "strategies": [strategy]})
    checked = check_sweep(config, config.run_dir)
    folder = Path(settings["run_dir"])
    prepare_run_directory(open_storage(str(folder)), config, checked.keys, variant_steps(checked), checked.bases)
    models = SlotModels(config, folder)
    try:
        lm, task = models.lm(), load_task(config.task, config.args)
        assign_lm(task.program, lm)
        engine = lm.engine
        optimizer = SweepBetterTogether(
            task,
            lm,
            seed=config.seed,
            scratch_dir=lambda prefix: folder,
            engine=engine,
            evaluator=LocalEvaluator(task.metric, engine.latch),
            steps=OwnSteps(folder, strategy, task.program, engine, keys=checked.first.keys),
        )
        optimizer.walk(strategy, num_threads=config.num_threads)
        assert optimizer.failure is None, optimizer.failure
    finally:
        models.close()
    return run_sweep(config)  # nothing is left to compute
