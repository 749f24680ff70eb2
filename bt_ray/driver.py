"""The driver of a sweep: check, place the servers, let Ray Tune run the trials, rank, keep the best, test it."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bt_ray.best import keep_best
from bt_ray.cluster import Listener, cause_of, connected, opened_pool, watched
from bt_ray.config import SweepConfig, make_config, with_absolute_paths
from bt_ray.errors import BtRayError, ConfigError, InfrastructureError, StorageError
from bt_ray.events import Stage, StepFinished, TrialEnded, TrialLost, TrialStarted
from bt_ray.fingerprint import digest
from bt_ray.node_disk import Scratch
from bt_ray.preflight import Checked, check_sweep, inside_job
from bt_ray.results import Candidate, StepFailure, SweepResult, TrialResult
from bt_ray.run_directory import RESULT, prepare_run_directory
from bt_ray.run_lock import held
from bt_ray.storage import open_storage
from bt_ray.store import FinishedStep, StepStore
from bt_ray.strategy import BASELINE, prefixes, start_order

if TYPE_CHECKING:
    from bt_ray.trial import TrialSetup

CLAIMS_PER_DRIVER = 1_000_000
"""Claims are numbered from this multiple of how many drivers the run directory has seen, so none is numbered twice."""


RAY_TUNE_LOGS = ("ray.tune.tune", "ray.tune.execution.tune_controller", "ray.tune.analysis.experiment_analysis")


def sweep(
    task: str,
    config: SweepConfig | Mapping[str, Any],
    *,
    run_dir: str | Path | None = None,
    address: str | None = None,
    listener: Listener | None = None,
    accept_changes: bool = False,
) -> SweepResult:
    """Run every strategy of `config` on `task`, and return the ranked result.

    Args:
        task: `"module:function"` or `"path/to/file.py:function"`; replaces `config`'s.
        config: The settings, or their values as in `sweep.toml`. Relative paths are relative to the current directory.
        run_dir: Where everything is kept; replaces `config`'s. Default: a new folder below `runs/`.
        address: The Ray cluster; default: the one that `RAY_ADDRESS` or the job names, else one of its own.
        listener: Told what happens, from several threads.
        accept_changes: Whether finished steps in `run_dir` are computed again that depend on something that changed since.

    Raises:
        BtRayError: The sweep cannot start, or the servers cannot be had. A strategy that fails does not raise: it is a
            row of the result with its error.
    """
    values = config.model_dump() if isinstance(config, SweepConfig) else dict(config)
    values |= {"task": task} | ({"run_dir": str(run_dir)} if run_dir is not None else {})
    values = with_absolute_paths(values, Path.cwd(), refuse_relative=inside_job())
    return run_sweep(make_config(values), address=address, listener=listener, accept_changes=accept_changes)


def run_sweep(
    config: SweepConfig,
    *,
    address: str | None = None,
    listener: Listener | None = None,
    accept_changes: bool = False,
) -> SweepResult:
    """`sweep` with everything in `config`."""
    tell = listener or (lambda event: None)
    tell(Stage("Checking the task"))
    run_dir = run_directory(config)
    config = config.model_copy(update={"run_dir": run_dir})
    checked = check_sweep(config, run_dir, accept_changes=accept_changes)
    with held(open_storage(run_dir), lambda text: tell(Stage(text))) as drivers:
        sweep = _Sweep(config, run_dir, checked, tell)
        prepare_run_directory(sweep.store.storage, config, checked.keys)
        return sweep.run(address, first_fence=drivers * CLAIMS_PER_DRIVER)


class _Sweep:
    """One run of a sweep, in its run directory."""

    def __init__(self, config: SweepConfig, run_dir: str, checked: Checked, tell: Listener) -> None:
        self.config = config
        self.run_dir = run_dir
        self.checked = checked
        self.tell = tell
        self.store = StepStore(open_storage(run_dir))
        self.started = time.time()

    def run(self, address: str | None, first_fence: int) -> SweepResult:
        """Compute what is not finished, keep the best, and test it."""
        keys = self.checked.keys
        finished = self.finished()
        if finished:
            self.tell(Stage(f"{len(finished)} of {len(keys)} steps are finished already, the baseline included"))
        if len(finished) == len(keys):
            result = self.with_known_test(self.gathered({}))
            if result.test_score is not None or not self.checked.task.testset:
                self.keep(result)
                return result
        with connected(address, self.tell) as own, self.pool(own) as pool:
            setup = self.setup(pool, {finished[prefix].key for prefix in finished}, first_fence)
            with watched(pool, self.store.storage, self.tell) if pool is not None else nullcontext():
                errors = _run_trials(setup, finished, self.tell) if len(finished) < len(keys) else {}
                result = self.with_known_test(self.gathered(errors))
                self.keep(result)
                if result.best is not None and result.test_score is None and self.checked.task.testset:
                    self.store.storage.write_json(self.test_file(result.best), _tested(result.best, setup, self.tell))
                    result = self.with_known_test(self.gathered(errors))
                    self.keep(result)
        return result

    def pool(self, own: bool) -> AbstractContextManager[Any]:
        """The pool of model servers; none where all LMs are APIs'."""
        if not self.checked.bases:
            return nullcontext()
        return opened_pool(self.config, self.run_dir, self.checked.models_at_once, own, self.tell)

    def setup(self, pool: Any, committed: set[str], first_fence: int) -> "TrialSetup":
        from bt_ray.actors.step_claims import StepClaims
        from bt_ray.trial import TrialSetup

        claims = StepClaims.remote(committed, first_fence)  # type: ignore[attr-defined]
        task = portable_task(self.config.task)
        return TrialSetup(self.config, task, self.run_dir, self.checked.keys, pool, claims)

    def finished(self) -> dict[str, FinishedStep]:
        """The finished steps of the sweep's strategies, by prefix."""
        return self.store.finished({prefix: key.key for prefix, key in self.checked.keys.items()}, self.checked.bases)

    def gathered(self, errors: Mapping[str, Exception]) -> SweepResult:
        """What is on the store, as the result. `errors`: of trials that were lost, by strategy."""
        finished = self.finished()
        trials = []
        for strategy in self.config.strategies:
            steps = list(takewhile(bool, (finished.get(prefix) for prefix in [BASELINE, *prefixes(strategy)])))
            candidates = tuple(step.candidate(strategy) for step in steps if step)
            failure = None if strategy in finished else self.failure(strategy, errors.get(strategy))
            trials.append(TrialResult(strategy, candidates, *((failure.message, failure.traceback) if failure else ())))
            self.tell(TrialEnded(strategy, trials[-1].error))
        return SweepResult(self.run_dir, tuple(trials), time.time() - self.started)

    def failure(self, strategy: str, error: Exception | None) -> StepFailure:
        """Why a trial did not get to its end: what it recorded itself, or how it was lost."""
        from bt_ray.trial import FAILURE_FILE, trial_name

        recorded = self.store.storage.read_json(f"trials/{trial_name(self.config, strategy)}/{FAILURE_FILE}")
        if recorded is not None:
            return StepFailure(**recorded)
        error = error or InfrastructureError("The trial was lost before its end.")
        return StepFailure(cause_of(error), str(error))

    def with_known_test(self, result: SweepResult) -> SweepResult:
        """The result with its best program's score on the testset, if that is on the store."""
        if result.best is None or not self.checked.task.testset:
            return result
        scores = self.store.storage.read_json(self.test_file(result.best))
        return replace(result, test_score=scores[0], test_example_scores=tuple(scores[1])) if scores else result

    def test_file(self, best: Candidate) -> str:
        """Where the score of a program on the testset is kept."""
        return f"tests/{self.checked.keys[best.prefix].key}-{digest(list(self.checked.task.testset or ()))}.json"

    def keep(self, result: SweepResult) -> None:
        self.store.storage.write_json(RESULT, result.to_json())
        if result.best is not None:
            keep_best(result.best, self.store.storage, self.checked.bases, self.config, self.config.task)


def run_directory(config: SweepConfig) -> str:
    """The location of `config`'s run directory: an absolute path, or a URI.

    Raises:
        ConfigError: It is relative inside a Ray job, whose working directory goes away with the job.
    """
    name = Path(config.task.rpartition(":")[0]).stem
    if config.run_dir and "://" in config.run_dir:
        return config.run_dir
    given = Path(config.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    if inside_job() and not given.is_absolute():
        raise ConfigError(
            f"run_dir: {given} is relative. A job's working directory is a copy that goes away with the job: give an "
            "absolute path that all nodes share, with --run-dir."
        )
    return str(given.resolve())


def portable_task(task: str) -> str:
    """The task's spec as a worker resolves it: inside a job relative to the working directory, which each node has."""
    where, _, function = task.rpartition(":")
    path = Path(where)
    if inside_job() and path.is_absolute() and path.is_relative_to(Path.cwd()):
        return f"{path.relative_to(Path.cwd())}:{function}"
    return task


def _run_trials(setup: "TrialSetup", finished: Mapping[str, FinishedStep], tell: Listener) -> dict[str, Exception]:
    """Run a Ray Tune trial for each strategy that lacks a step; the errors of those that were lost, by strategy."""
    import ray
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, TuneError, Tuner

    from bt_ray.trial import run_trial

    config = setup.config
    strategies = [s for s in start_order(config.strategies, finished) if not finished.keys() >= {BASELINE, *prefixes(s)}]
    for strategy in config.strategies:
        if strategy not in strategies:
            _tell_finished(strategy, finished, tell)
    tell(Stage(f"Running {len(strategies)} {'strategy' if len(strategies) == 1 else 'strategies'}"))
    for name in RAY_TUNE_LOGS:  # tracebacks of lost trials, which stand in the result, and files that nobody asked for
        logging.getLogger(name).setLevel(logging.CRITICAL)
    trainable = tune.with_resources(tune.with_parameters(run_trial, setup=setup), {"CPU": config.trial.cpus})
    concurrent = config.concurrent_trials(served=setup.pool is not None)
    errors: dict[str, Exception] = {}
    with Scratch("tune") as own_files:  # nobody reads them: the steps are on the store
        try:
            tuner = Tuner(
                trainable,
                param_space={"strategy": tune.grid_search(strategies)},
                # Each trial gets a fresh process: a task may call `dspy.configure`, which one thread of a process may.
                tune_config=TuneConfig(max_concurrent_trials=concurrent, reuse_actors=False),
                run_config=RunConfig(
                    name="tune",
                    storage_path=str(own_files.folder),
                    verbose=0,
                    failure_config=FailureConfig(max_failures=config.trial.max_failures),
                    callbacks=[_tune_callback(tell)],
                ),
            )
            for outcome in tuner.fit():
                if outcome.error is not None and outcome.config is not None:
                    errors[outcome.config["strategy"]] = outcome.error
        except (TuneError, ray.exceptions.RayError) as error:  # the trials kept what they found
            errors = dict.fromkeys(config.strategies, error)
        except OSError as error:
            raise StorageError(f"{own_files.folder} on this machine cannot be written: {error}") from error
    return errors


def _tell_finished(strategy: str, finished: Mapping[str, FinishedStep], tell: Listener) -> None:
    """Tell the steps of a strategy that lacks none."""
    best: float | None = None
    for prefix in [BASELINE, *prefixes(strategy)]:
        step = finished[prefix]
        best = step.score if best is None or step.score is None else max(best, step.score)
        tell(StepFinished(strategy, prefix, step.score, best, step.seconds, loaded=True))


def _tested(best: Candidate, setup: "TrialSetup", tell: Listener) -> tuple[float, Sequence[float]]:
    """The best program's score on the testset, in percent, and the metric's value for each example."""
    import ray

    from bt_ray.trial import TestEvaluation

    tell(Stage("Scoring the best program on the testset"))
    options = {"num_cpus": setup.config.trial.cpus, "max_restarts": setup.config.trial.max_failures}
    evaluation = TestEvaluation.options(**options).remote()  # type: ignore[attr-defined]
    try:
        scores: tuple[float, Sequence[float]] = ray.get(evaluation.score.remote(setup, best))
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), BtRayError):
            raise cause from error
        raise InfrastructureError(f"The test of the best program was lost: {error}") from error
    return scores


def last_failure(errors: str) -> str:
    """The last failure in Ray Tune's error file of a trial, in a line."""
    lines = errors.rpartition("Failure # ")[2].strip().splitlines()[1:]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("bt_ray.errors.")]
    return ours[-1] if ours else (lines or ["its process died"])[0]


def _tune_callback(tell: Listener) -> Any:
    from ray.tune import Callback

    class Told(Callback):  # type: ignore[misc]
        """Passes on what Ray Tune's trials report."""

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return Callback, ()  # Ray Tune keeps a copy of its callbacks on disk, which nobody reads

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            tell(TrialStarted(trial.config["strategy"]))

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            tell(TrialLost(trial.config["strategy"], last_failure(Path(trial.error_file).read_text())))

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            tell(
                StepFinished(
                    trial.config["strategy"],
                    result["prefix"],
                    result["score"],
                    result["best_score"],
                    result["seconds"],
                    result["loaded"],
                )
            )

    return Told()
