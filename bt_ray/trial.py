"""One trial: a strategy from start to end, and the evaluation of the winner on the testset.

Runs in a Ray Tune worker (or a Ray task): loads the task anew, wires its LMs to the pool, lets BetterTogether walk the
strategy, keeps each step's program and reports each step's score.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.actor import ActorHandle

from bt_ray.actors.metrics import TrialMetrics
from bt_ray.config import SweepConfig
from bt_ray.errors import BtRayError, InfrastructureError, InfrastructureFailure, StorageError
from bt_ray.failures import Side, side_of
from bt_ray.fingerprint import StepKey
from bt_ray.mlflow_runs import traced
from bt_ray.node_disk import Scratch
from bt_ray.results import Candidate, StepFailure, failure_of
from bt_ray.storage import Storage, open_storage
from bt_ray.store import FinishedStep, StepStore
from bt_ray.strategy import BASELINE, SEPARATOR

if TYPE_CHECKING:
    from bt_ray.task import TaskFunction

FAILURE_FILE, LOG, SCRATCH = "failure.json", "log.txt", "scratch"


@dataclass(frozen=True)
class TrialSetup:
    """What every trial of a sweep needs to know, under one variant of its settings.

    Attributes:
        config: The settings.
        task: The task's spec as a worker resolves it, or its function.
        run_dir: The location of the sweep's run directory.
        keys: The key of each step, by prefix.
        pool: The sweep's server pool; None if all LMs are APIs'.
        claims: Its step claims.
    """

    config: SweepConfig
    task: "str | TaskFunction"
    run_dir: str
    keys: Mapping[str, StepKey]
    pool: "ActorHandle[Any] | None"
    claims: "ActorHandle[Any]"

    @property
    def store(self) -> StepStore:
        return StepStore(open_storage(self.run_dir))


def run_trial(params: dict[str, Any], setups: Mapping[str, TrialSetup]) -> None:
    """Ray Tune's trainable: walk the strategy of `params["trial"]` under its variant, keep and report each step.

    A failure of the user's is kept in the trial's folder. Lost infrastructure is raised, and Ray Tune runs the trial again.
    """
    trial = params["trial"]
    strategy, folder, setup = trial["strategy"], f"trials/{trial['folder']}", setups[trial["variant"]]
    with (
        work_folder(setup.store.storage, folder) as here,
        _log_file(here / LOG),
        traced(setup.config, setup.run_dir, strategy, trial["variant"]),
    ):
        reporter = _Reporter(setup.run_dir)
        try:
            failure = _walk(strategy, setup, here, reporter)
        except InfrastructureFailure as lost:
            raise InfrastructureError(str(lost)) from lost
        except Exception as error:
            if side_of(error) is Side.INFRASTRUCTURE:
                raise
            failure = failure_of(error)
        if failure is not None:
            setup.store.storage.write_json(f"{folder}/{FAILURE_FILE}", asdict(failure))
        reporter.finish()


def _walk(strategy: str, setup: TrialSetup, work_folder: Path, reporter: "_Reporter") -> StepFailure | None:
    """Walk the strategy; returns how the step failed that ended it early, None if it went to its end."""
    import dspy

    from bt_ray.actors.step_claims import RemoteClaims
    from bt_ray.better_together import SweepBetterTogether
    from bt_ray.kept_steps import KeptSteps
    from bt_ray.lm import student_lm

    config = setup.config
    with student(setup, f"trial {strategy}", config.num_threads) as (task, models, hosted):
        steps = KeptSteps(
            setup.store,
            RemoteClaims(setup.claims),
            setup.keys,
            task.program,
            models,
            give_back=hosted.give_back,
            on_step=reporter.report,
        )
        optimizer = SweepBetterTogether(
            task,
            student_lm(task.program),
            seed=config.seed,
            scratch_dir=lambda prefix: scratch_dir(setup, work_folder, prefix),
            latch=models.engine.latch,
            engine=models.engine,
            steps=steps,
            retries=config.trial.step_retries,
        )
        with dspy.context(**_dspy_settings(config)):
            optimizer.walk(
                strategy,
                num_threads=config.num_threads,
                max_errors=config.max_errors,
                provide_traceback=config.provide_traceback,
                valset_ratio=config.valset_ratio,
                shuffle_trainset_between_steps=config.shuffle_trainset_between_steps,
            )
        return optimizer.failure


@ray.remote
class TestEvaluation:
    """Evaluates a program on the testset. An actor, because the pool takes back what a dead actor leased."""

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]  # as often as the actor is restarted
    def score(self, setup: TrialSetup, best: Candidate) -> "Scores":
        """The program's score on the task's testset, in percent, and the metric's value for each example."""
        try:
            return _evaluate_on_testset(setup, best)
        except InfrastructureFailure as failure:
            raise InfrastructureError(str(failure)) from failure


Scores = tuple[float, tuple[float, ...]]
"""A program's score, in percent, and the metric's value for each example."""


def tested(candidates: Mapping[str, tuple[TrialSetup, Candidate]], at_once: int) -> Iterator[tuple[str, Scores]]:
    """The scores of candidates on the testset, by name, as they come.

    Args:
        candidates: The candidates, with their setups.
        at_once: How many are evaluated at the same time.

    Raises:
        BtRayError: An evaluation was lost, after all others came.
    """
    waiting = list(candidates.items())
    running: dict[Any, tuple[str, Any]] = {}
    lost: BtRayError | None = None
    while waiting or running:
        while waiting and len(running) < at_once:
            name, (setup, candidate) = waiting.pop(0)
            options = {"num_cpus": setup.config.trial.cpus, "max_restarts": setup.config.trial.max_failures}
            evaluation = TestEvaluation.options(**options).remote()  # type: ignore[attr-defined]
            running[evaluation.score.remote(setup, candidate)] = (name, evaluation)
        (done,), _ = ray.wait(list(running))
        name, _ = running.pop(done)
        try:
            scores: Scores = ray.get(done)
            yield name, scores
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            lost = cause if isinstance(cause, BtRayError) else InfrastructureError(f"A test was lost: {error}")
    if lost is not None:
        raise lost


def _evaluate_on_testset(setup: TrialSetup, best: Candidate) -> Scores:
    import dspy

    from bt_ray.better_together import told
    from bt_ray.kept_steps import load_state
    from bt_ray.served_models import assign_versions

    config = setup.config
    with (
        work_folder(setup.store.storage, f"trials/test-{setup.keys[best.prefix].key[:12]}") as here,
        _log_file(here / LOG),
        student(setup, f"test of {best.prefix or 'baseline'}", config.num_threads) as (task, models, _),
    ):
        assign_versions(task.program, best.weights, best.api_models, models, setup.store.read_weights)
        load_state(task.program, setup.store.read_program(best.program))
        with dspy.context(**_dspy_settings(config)):
            result = dspy.Evaluate(
                devset=list(task.testset or ()),
                metric=told(task.metric, models.engine.latch, []),
                num_threads=config.num_threads,
                max_errors=len(task.testset or ()) + 1,
            )(told(task.program, models.engine.latch, []))
        models.engine.latch.check()
        return float(result.score), tuple(float(score) for _, _, score in result.results)


@contextmanager
def student(setup: TrialSetup, holder: str, threads: int) -> Iterator[tuple[Any, Any, Any]]:
    """The task with LMs, who makes them, and who hosts the models; gives all leases back at the end."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # LiteLLM fetches a price list otherwise

    from bt_ray.actors.leased_models import LeasedModels
    from bt_ray.hosting import FailureLatch, NoModels
    from bt_ray.lm import ServedEngine
    from bt_ray.one_core import OneCore
    from bt_ray.served_models import ServedModels, serving
    from bt_ray.task import load_task

    config = setup.config
    none = NoModels("This sweep serves no model.")
    hosted = LeasedModels(holder, setup.pool, config) if setup.pool is not None else none
    engine = ServedEngine(
        hosted,
        FailureLatch(),
        retries=config.trial.request_retries,
        timeout_s=config.server.request_timeout_s,
        max_connections=max(100, threads),
        one_core=OneCore(),
    )
    models = ServedModels(engine, config)
    try:
        with serving(models):
            task = load_task(setup.task, config.args)
            models.assign_student(task.program)
            yield task, models, hosted
    finally:
        hosted.close()


class _Reporter:
    """Tells Ray Tune what each step gave."""

    def __init__(self, run_dir: str) -> None:
        self._best: float | None = None
        self._reported = False
        self._metrics = TrialMetrics(run_dir)

    def report(self, step: FinishedStep, loaded: bool) -> None:
        if step.score is not None:
            self._best = step.score if self._best is None else max(self._best, step.score)
        values = {"prefix": step.prefix, "score": step.score, "best_score": self._best, "seconds": step.seconds}
        values |= {"tokens": step.prompt_tokens + step.completion_tokens, "loaded": loaded}
        # As text: Ray Tune takes dictionaries apart, and its loggers draw lists.
        tune.report({**values, "example_errors": json.dumps(step.example_errors)})
        self._reported = True
        if not loaded:
            self._metrics.step(step.seconds, step.requests, step.prompt_tokens, step.completion_tokens)

    def finish(self) -> None:
        if not self._reported:  # Ray Tune takes a trial that never reported for a lost one
            nothing = {"prefix": BASELINE, "score": None, "best_score": None, "seconds": 0.0, "tokens": 0}
            tune.report({**nothing, "loaded": True, "example_errors": "{}"})


def _dspy_settings(config: SweepConfig) -> dict[str, Any]:
    """DSPy's settings for evaluations that say nothing else: those of optimizers, and of the testset."""
    names = ("num_threads", "max_errors", "provide_traceback")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def scratch_dir(setup: TrialSetup, folder: Path, prefix: str) -> Path:
    """The step's folder for its optimizer's own files: empty, unless they are to be found again by the next attempt."""
    if setup.config.trial.resume_optimizers and (run_dir := setup.store.storage.folder) is not None:
        made = run_dir / SCRATCH / setup.keys[prefix].key
    else:
        made = folder / SCRATCH / (prefix.replace(SEPARATOR, "-") or "baseline")
        shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True, exist_ok=True)
    return made


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
            if (log := scratch.folder / LOG).exists():
                with contextlib.suppress(StorageError):  # a log that is lost costs no result
                    storage.write(f"{name}/{LOG}", log.read_bytes())


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
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
