"""One trial: a strategy from start to end, and the evaluation of the winner on the testset.

Runs in a Ray Tune worker (or a Ray task): loads the task anew, wires its LMs to the pool, lets BetterTogether walk the
strategy, keeps each step's program and reports each step's score.
"""

import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from bt_ray.config import SweepConfig
from bt_ray.errors import InfrastructureError, InfrastructureFailure
from bt_ray.results import Candidate, TrialResult, write_json
from bt_ray.strategy import BASELINE, SEPARATOR, length
from bt_ray.weights import Weights

TRIAL_FILE = "trial.json"


@dataclass(frozen=True)
class TrialSetup:
    """What every trial of a sweep needs to know.

    Attributes:
        config: The sweep's settings.
        task: The task's spec as a worker resolves it.
        run_dir: The sweep's run directory.
        base: The student's base weights.
        pool: The sweep's server pool.
        servers: Its model servers.
    """

    config: SweepConfig
    task: str
    run_dir: Path
    base: Weights
    pool: "ActorHandle[Any]"
    servers: "Sequence[ActorHandle[Any]]"

    def trial_dir(self, strategy: str) -> Path:
        return self.run_dir / "trials" / f"{self.config.strategies.index(strategy):03d}-{slug(strategy)}"


def slug(prefix: str) -> str:
    """A prefix as a file name: `"p -> w"` is `p-w`."""
    return prefix.replace(SEPARATOR, "-") or "baseline"


def run_trial(params: dict[str, Any], setup: TrialSetup) -> None:
    """Ray Tune's trainable: walk `params["strategy"]`, keep and report each step.

    A failure of the user's is kept in the trial's result. Lost infrastructure is raised, and Ray Tune runs the trial again.
    """
    strategy = params["strategy"]
    trial_dir = setup.trial_dir(strategy)
    with _log_file(trial_dir / "log.txt"):
        recorder = _Recorder(setup, strategy, trial_dir)
        try:
            step_error = _walk(strategy, setup, trial_dir, recorder)
        except InfrastructureFailure as failure:
            raise InfrastructureError(str(failure)) from failure
        except InfrastructureError:
            raise
        except Exception as failure:
            step_error = (f"{type(failure).__name__}: {failure}", traceback.format_exc())
        recorder.finish(step_error)


def _walk(strategy: str, setup: TrialSetup, trial_dir: Path, recorder: "_Recorder") -> tuple[str, str] | None:
    """Walk the strategy; returns message and traceback of the step that ended it early, None if it went to its end."""
    import dspy

    from bt_ray.better_together import SweepBetterTogether, student_lm

    config = setup.config
    with student(setup, f"trial {strategy}", config.num_threads) as (task, engine):
        optimizer = SweepBetterTogether(
            task,
            student_lm(task.program),
            seed=config.seed,
            scratch_dir=trial_dir / "scratch",
            latch=engine.latch,
            engine=engine,
            on_step=recorder.record,
        )
        with dspy.context(num_threads=config.num_threads, **_max_errors(config)):
            optimizer.walk(
                strategy,
                num_threads=config.num_threads,
                max_errors=config.max_errors,
                provide_traceback=config.provide_traceback,
                valset_ratio=config.valset_ratio,
                shuffle_trainset_between_steps=config.shuffle_trainset_between_steps,
            )
        return optimizer.step_error


@ray.remote
class TestEvaluation:
    """Evaluates the best program on the testset. An actor, because the pool takes back what a dead actor leased."""

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]  # as often as the actor is restarted
    def score(self, setup: TrialSetup, best: Candidate) -> tuple[float, tuple[float, ...]]:
        """The program's score on the task's testset, in percent, and the metric's value for each example."""
        try:
            return _evaluate_on_testset(setup, best)
        except InfrastructureFailure as failure:
            raise InfrastructureError(str(failure)) from failure


def _evaluate_on_testset(setup: TrialSetup, best: Candidate) -> tuple[float, tuple[float, ...]]:
    import dspy

    from bt_ray.best import load_state
    from bt_ray.lm import served_lm

    config = setup.config
    with _log_file(setup.run_dir / "trials" / "test.txt"), student(setup, "test", config.num_threads) as (task, engine):
        weights = {i: _stored_weights(setup, i) for i in set(best.weights.values())}
        for stored in weights.values():
            engine.models.add(stored)
        for name, predictor in task.program.named_predictors():
            if name in best.weights:
                predictor.lm = served_lm(weights[best.weights[name]], engine, config.lm)
        load_state(task.program, setup.run_dir / best.program)
        with dspy.context(num_threads=config.num_threads):
            result = dspy.Evaluate(
                devset=list(task.testset or ()),
                metric=task.metric,
                num_threads=config.num_threads,
                max_errors=len(task.testset or ()) + 1,
            )(task.program)
        engine.latch.check()
        return float(result.score), tuple(float(score) for _, _, score in result.results)


@contextmanager
def student(setup: TrialSetup, holder: str, threads: int) -> Iterator[tuple[Any, Any]]:
    """The task with the served LM assigned, and the LM's engine; gives all leases back at the end."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # LiteLLM fetches a price list otherwise

    from bt_ray.actors.leased_models import LeasedModels
    from bt_ray.hosting import FailureLatch
    from bt_ray.lm import ServedEngine, assign_lm, served_lm
    from bt_ray.task import load_task

    config = setup.config
    task = load_task(setup.task)
    models = LeasedModels(
        holder, setup.pool, setup.servers, base=setup.base, config=config, weights_dir=setup.run_dir / "weights"
    )
    engine = ServedEngine(
        models,
        FailureLatch(),
        retries=config.trial.request_retries,
        timeout_s=config.server.request_timeout_s,
        max_connections=max(100, threads),
    )
    assign_lm(task.program, served_lm(setup.base, engine, config.lm))
    try:
        yield task, engine
    finally:
        models.close()


class _Recorder:
    """Keeps what a trial finds: each step's program, and `trial.json` after each step."""

    def __init__(self, setup: TrialSetup, strategy: str, trial_dir: Path) -> None:
        self._setup = setup
        self._strategy = strategy
        self._trial_dir = trial_dir
        self._candidates: list[Candidate] = []

    def record(self, outcome: Any) -> None:
        """Keep and report a step.

        Raises:
            InfrastructureFailure: The run directory cannot be written.
        """
        try:
            self._keep(outcome)
        except OSError as error:
            raise InfrastructureFailure(f"{self._trial_dir} cannot be written: {error}") from error

    def _keep(self, outcome: Any) -> None:
        from bt_ray.best import save_program, served_weights

        program = self._trial_dir / f"{length(outcome.prefix)}-{slug(outcome.prefix)}" / "program.json"
        save_program(outcome.program, program)
        candidate = Candidate(
            strategy=self._strategy,
            prefix=outcome.prefix,
            score=outcome.score,
            example_scores=outcome.example_scores,
            started=outcome.started,
            seconds=outcome.seconds,
            weights=served_weights(outcome.program),
            program=str(program.relative_to(self._setup.run_dir)),
        )
        self._candidates.append(candidate)
        trial = self._write(None)
        assert trial.best is not None
        tune.report(
            {
                "prefix": candidate.prefix or BASELINE,
                "score": candidate.score,
                "best_score": trial.best.score,
                "seconds": candidate.seconds,
            }
        )

    def finish(self, error: tuple[str, str] | None) -> None:
        self._write(error)
        if not self._candidates:
            tune.report({"prefix": BASELINE, "score": None, "best_score": None, "seconds": 0.0})

    def _write(self, error: tuple[str, str] | None) -> TrialResult:
        message, trace = error or (None, None)
        trial = TrialResult(self._strategy, tuple(self._candidates), message, trace)
        write_json(self._trial_dir / TRIAL_FILE, trial.to_json())
        return trial


def _stored_weights(setup: TrialSetup, weights_id: str) -> Weights:
    from bt_ray.weights import read_manifest

    return setup.base if weights_id == setup.base.id else read_manifest(setup.run_dir / "weights" / weights_id)


def _max_errors(config: SweepConfig) -> dict[str, int]:
    return {} if config.max_errors is None else {"max_errors": config.max_errors}


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
        handler.close()
