"""The trials of a sweep on Ray Tune: each walks a strategy under one variant of the settings."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bt_ray.driver.search import SearchWalk
from bt_ray.errors import StorageError
from bt_ray.events import Event, Stage, StepFinished, TrialLost, TrialStarted
from bt_ray.run_dir.node_disk import Scratch
from bt_ray.strategy import SEPARATOR
from bt_ray.tracking.tune_loggers import tune_loggers

if TYPE_CHECKING:
    from bt_ray.trial.setup import TrialSetup

MOST_TRIALS = 1 << 30
"""Of a search, which says itself when it is over."""
RAY_TUNE_LOGS = ("ray.tune.tune", "ray.tune.execution.tune_controller", "ray.tune.analysis.experiment_analysis")


@dataclass(frozen=True)
class Trial:
    """A strategy under one variant of the settings.

    Attributes:
        number: Its place among the trials of its sweep.
        strategy: The strategy.
        variant: The variant's name; `""` in a sweep without a space.
    """

    number: int
    strategy: str
    variant: str = ""

    @property
    def folder(self) -> str:
        """Its folder below `trials/`."""
        return f"{self.number:03d}-{self.strategy.replace(SEPARATOR, '-')}"

    def params(self) -> dict[str, Any]:
        """As Ray Tune knows it."""
        return {"strategy": self.strategy, "variant": self.variant, "folder": self.folder}


def run_trials(
    trials: Sequence[Trial], setups: Mapping[str, "TrialSetup"], servers: int, tell: Callable[[Event], None]
) -> dict[Trial, Exception]:
    """Run a Ray Tune trial for each of these; the errors of those that were lost.

    Args:
        trials: The trials, in the order in which to start them.
        setups: What trials need to know, by variant.
        servers: The servers that they share; 0 where no model is served.
        tell: Told what happens.
    """
    from ray import tune

    tell(Stage(f"Running {len(trials)} {'strategy' if len(trials) == 1 else 'strategies'}"))
    space = {"trial": tune.grid_search([trial.params() for trial in trials])}
    by_folder = {trial.folder: trial for trial in trials}
    try:
        lost = _tune(space, {}, len(trials), setups, servers, tell)
    except _TuneFailed as failed:  # the trials kept what they found
        return dict.fromkeys(trials, failed.error)
    return {by_folder[folder]: error for folder, error in lost.items()}


def run_search(walk: SearchWalk, setup: "TrialSetup", servers: int, tell: Callable[[Event], None]) -> dict[str, Exception]:
    """Run a Ray Tune trial for each strategy that the search wants walked; the errors of those that were lost, by strategy.

    Args:
        walk: The search.
        setup: What trials need to know.
        servers: The servers that they share; 0 where no model is served.
        tell: Told what happens.
    """
    tell(Stage("Searching for the best strategy"))
    how = {"search_alg": _searcher(walk), "num_samples": -1}
    try:
        lost = _tune({}, how, MOST_TRIALS, {"": setup}, servers, tell)
    except _TuneFailed as failed:
        return dict.fromkeys(walk.strategies, failed.error)
    return {walk.strategies[int(folder.partition("-")[0])]: error for folder, error in lost.items()}


def _searcher(walk: SearchWalk) -> Any:
    from ray.tune.search import Searcher

    class Walked(Searcher):  # type: ignore[misc]
        """Ray Tune's side of a search."""

        def __init__(self) -> None:
            super().__init__()
            self._strategies: dict[str, str] = {}

        def __deepcopy__(self, memo: dict[int, Any]) -> "Walked":
            return self

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return Searcher, ()  # Ray Tune keeps a copy of it on disk, which nobody reads

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            strategy = walk.next()
            if strategy is None:
                return Searcher.FINISHED if walk.is_over else None
            self._strategies[trial_id] = strategy
            return {"trial": Trial(len(walk.strategies) - 1, strategy).params()}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            loaded = result["loaded"]
            walk.note_finished(result["prefix"], result["score"], result["seconds"], result["tokens"], loaded=loaded)

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            walk.note_ended(self._strategies[trial_id])

        def save(self, checkpoint_path: str) -> None:
            """Nothing: what is known is on the step store."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing: Ray Tune is never asked to go on where it stopped."""

    return Walked()


class _TuneFailed(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _tune(
    space: Mapping[str, Any],
    how: Mapping[str, Any],
    trials: int,
    setups: Mapping[str, "TrialSetup"],
    servers: int,
    tell: Callable[[Event], None],
) -> dict[str, Exception]:
    """Have Ray Tune run trials of this space; the errors of those that were lost, by folder.

    Args:
        space: Ray Tune's `param_space`.
        how: Further settings of `TuneConfig`.
        trials: Trials at most.
        setups: What trials need to know, by variant.
        servers: The servers that they share; 0 where no model is served.
        tell: Told what happens.
    """
    import ray
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, TuneError, Tuner

    from bt_ray.trial.trial import run_trial

    first = next(iter(setups.values()))
    config = first.config
    needed = tune.PlacementGroupFactory([{"CPU": config.trial.cpus}] * config.trial.processes)
    trainable = tune.with_resources(tune.with_parameters(run_trial, setups=dict(setups)), needed)
    concurrent = config.concurrent_trials(trials, servers)
    for name in RAY_TUNE_LOGS:  # tracebacks of lost trials, which stand in the result, and files that nobody asked for
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with Scratch("tune") as own_files:  # nobody reads its files: the steps are on the store
        try:
            tuner = Tuner(
                trainable,
                param_space=dict(space),
                # Each trial gets a fresh process: a task may call `dspy.configure`, which one thread of a process may.
                tune_config=TuneConfig(
                    max_concurrent_trials=concurrent,
                    reuse_actors=False,
                    trial_name_creator=_folder,
                    trial_dirname_creator=_folder,
                    **how,
                ),
                run_config=RunConfig(
                    name="tune",
                    storage_path=str(own_files.folder),
                    verbose=0,
                    failure_config=FailureConfig(max_failures=config.trial.max_failures),
                    callbacks=[_tune_callback(tell), *tune_loggers(config.tracking, first.run_dir)],
                ),
            )
            outcomes = [outcome for outcome in tuner.fit() if outcome.error is not None and outcome.config is not None]
            return {outcome.config["trial"]["folder"]: outcome.error for outcome in outcomes}
        except (TuneError, ray.exceptions.RayError) as error:
            raise _TuneFailed(error) from error
        except OSError as error:
            raise StorageError(f"{own_files.folder} on this machine cannot be written: {error}") from error


def _folder(trial: Any) -> str:
    """What Ray Tune calls a trial: as its folder in the run directory."""
    folder: str = trial.config["trial"]["folder"]
    return folder


def last_failure(errors: str) -> str:
    """The last failure in Ray Tune's error file of a trial, in a line."""
    lines = errors.rpartition("Failure # ")[2].strip().splitlines()[1:]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("bt_ray.errors.")]
    return ours[-1] if ours else (lines or ["its process died"])[0]


def _tune_callback(tell: Callable[[Event], None]) -> Any:
    from ray.tune import Callback

    class Told(Callback):  # type: ignore[misc]
        """Passes on what Ray Tune's trials report."""

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return Callback, ()  # Ray Tune keeps a copy of its callbacks on disk, which nobody reads

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            params = trial.config["trial"]
            tell(TrialStarted(params["strategy"], params["variant"]))

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            params, reason = trial.config["trial"], last_failure(Path(trial.error_file).read_text())
            tell(TrialLost(params["strategy"], reason, params["variant"]))

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            tell(
                StepFinished(
                    trial.config["trial"]["strategy"],
                    result["prefix"],
                    result["score"],
                    result["best_score"],
                    result["seconds"],
                    result["loaded"],
                    trial.config["trial"]["variant"],
                    json.loads(result["example_errors"]),
                )
            )

    return Told()
