"""A sweep in MLflow: a run for the sweep, and below it one for each of its trials, with a metric's value for each step."""

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from bt_ray.errors import ConfigError
from bt_ray.events import Event, Stage, StepFinished, TrialEnded, TrialStarted
from bt_ray.run_dir.results import SweepResult, TrialResult, best_so_far
from bt_ray.run_dir.storage import Storage
from bt_ray.settings.config import SweepConfig
from bt_ray.strategy import length, step_label, variant_name

logger = logging.getLogger(__name__)
SWEEP_TAG, TRIAL_TAG = "bt_ray.sweep", "bt_ray.trial"
"""Which sweep a run is of, and which trial; the sweep's own run is of no trial."""
CLOSE_S = 60.0
"""Seconds that a tracking server has to take what is left when the sweep ends."""
RUN_S = 20.0
"""Seconds that a trial waits for its run, which the driver makes when it hears that the trial started."""
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default a server that is gone is asked for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


@dataclass
class _Run:
    """A run, and the steps whose metrics it has."""

    id: str
    steps: set[int] = field(default_factory=set)


class MlflowRuns:
    """Tells MLflow of a sweep from a thread of its own, so that a tracking server that is slow or gone costs no step.

    A sweep that goes on in its run directory goes on in its runs.

    Raises:
        ConfigError: MLflow cannot be reached.
    """

    def __init__(self, config: SweepConfig, storage: Storage, tell: Callable[[Event], None]) -> None:
        self._config, self._storage, self._tell = config, storage, tell
        self._tags = {SWEEP_TAG: _sweep_tag(storage.location), "bt_ray.run_dir": storage.location}
        self._todo: queue.Queue[Event | SweepResult | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._warned = False
        try:
            self._client = _client(config)
            self._experiment = _experiment(self._client, config)
            found = _runs(self._client, self._experiment, storage.location)
            self._trials = {name: self._find_run(run_id) for name, run_id in found.items() if name}
            self._sweep = _Run(found.get("") or self._create_run("", f"sweep {_name(config)}", {}))
            self._client.update_run(self._sweep.id, status="RUNNING")
            if "" not in found:
                self._log_settings()
        except Exception as error:  # MLflow's own, those of requests, of SQLAlchemy
            uri = config.tracking.mlflow
            raise ConfigError(f"tracking.mlflow: {uri} cannot be used: {type(error).__name__}: {error}") from error

    def note(self, event: Event) -> None:
        """Tell MLflow of it, soon."""
        if isinstance(event, TrialStarted | StepFinished | TrialEnded):
            self._todo.put(event)

    def finish(self, result: SweepResult) -> None:
        """Tell MLflow how it ended, soon."""
        self._todo.put(result)

    @contextmanager
    def kept(self) -> Iterator[Self]:
        """Until the context ends, when MLflow gets a little time for what it was not told yet."""
        self._worker.start()
        status = "KILLED"
        try:
            yield self
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self._todo.put(None)
            self._worker.join(CLOSE_S)
            if self._worker.is_alive():
                self._warn("it does not answer")
            else:
                with self._warn_once():
                    self._client.set_terminated(self._sweep.id, status)

    def _work(self) -> None:
        while (todo := self._todo.get()) is not None:
            with self._warn_once():
                self._handle(todo)

    def _handle(self, todo: Event | SweepResult) -> None:
        match todo:
            case TrialStarted(strategy, variant):
                self._client.update_run(self._trial(strategy, variant).id, status="RUNNING")
            case StepFinished():
                run = self._trial(todo.strategy, todo.variant)
                self._log_step(run, todo.prefix, todo.score, todo.best_score, todo.seconds)
            case TrialEnded(strategy, error, variant):
                run = self._trial(strategy, variant)
                if error:
                    self._client.set_tag(run.id, "error", error[:5000])
                self._client.set_terminated(run.id, "FAILED" if error else "FINISHED")
            case SweepResult():
                self._log_result(todo)

    def _log_step(self, run: _Run, prefix: str, score: float | None, best: float | None, seconds: float) -> None:
        from mlflow.entities import Metric

        step, now = length(prefix), int(time.time() * 1000)
        if step in run.steps:
            return
        values = {"score": score, "best_score": best, "seconds": seconds}
        metrics = [Metric(key, value, now, step) for key, value in values.items() if value is not None]
        self._client.log_batch(run.id, metrics=metrics)
        run.steps.add(step)
        if best is not None:
            self._client.log_metric(self._sweep.id, "best_score", best, step=step)

    def _log_result(self, result: SweepResult) -> None:
        """What the sweep found, whole: also what MLflow was not told while it ran."""
        for trial in result.trials:
            self._log_trial(trial)
        if (best := result.best) is not None:
            self._client.set_tag(self._sweep.id, "bt_ray.winner", best.prefix or "baseline")
            scores = {"winner_score": best.score, "winner_test_score": best.test_score}
            for key, score in scores.items():
                if score is not None:
                    self._client.log_metric(self._sweep.id, key, score)
            self._client.log_dict(self._sweep.id, self._storage.read_json(best.program), "best/program.json")
        self._client.log_dict(self._sweep.id, result.to_json(), "result.json")
        self._client.log_text(self._sweep.id, _report(self._storage), "report.html")

    def _log_trial(self, trial: TrialResult) -> None:
        run = self._trial(trial.strategy, variant_name(trial.settings))
        best = best_so_far(candidate.score for candidate in trial.candidates)
        for candidate, best_score in zip(trial.candidates, best, strict=True):
            self._log_step(run, candidate.prefix, candidate.score, best_score, candidate.seconds)
            program = self._storage.read_json(candidate.program)
            self._client.log_dict(run.id, program, f"programs/{length(candidate.prefix)}.json")
        if trial.best is not None and trial.best.test_score is not None:
            self._client.log_metric(run.id, "test_score", trial.best.test_score)

    def _log_settings(self) -> None:
        from mlflow.entities import Param

        settings = self._config.without_secrets()
        flat = {key: value for key, value in settings.items() if not isinstance(value, dict)}
        flat |= {f"{table}.{key}": value for table in ("lm", "train") for key, value in settings[table].items()}
        params = [Param(key, str(value)[:5000]) for key, value in flat.items() if value is not None]
        self._client.log_batch(self._sweep.id, params=params)
        self._client.log_dict(self._sweep.id, settings, "config.json")

    def _trial(self, strategy: str, variant: str) -> _Run:
        """The run of a trial, made if there is none."""
        name = step_label(strategy, variant)
        if name not in self._trials:
            tags = {"mlflow.parentRunId": self._sweep.id}
            run = self._trials[name] = _Run(self._create_run(name, name, tags))
            self._client.log_param(run.id, "strategy", strategy)
            if variant:
                self._client.log_param(run.id, "variant", variant)
        return self._trials[name]

    def _create_run(self, trial: str, name: str, tags: Mapping[str, str]) -> str:
        tags = {**self._tags, TRIAL_TAG: trial, **tags}
        run_id: str = self._client.create_run(self._experiment, tags=tags, run_name=name).info.run_id
        return run_id

    def _find_run(self, run_id: str) -> _Run:
        return _Run(run_id, {metric.step for metric in self._client.get_metric_history(run_id, "seconds")})

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        """What MLflow refuses is told, once, and costs nothing else."""
        try:
            yield
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._tell(Stage(f"MLflow was not told everything ({reason}). The sweep goes on, and tells it again at its end"))


@contextmanager
def mlflow_runs(config: SweepConfig, storage: Storage, tell: Callable[[Event], None]) -> Iterator[MlflowRuns | None]:
    """The sweep's runs in MLflow, if it is to be told."""
    if config.tracking.mlflow is None:
        yield None
        return
    with MlflowRuns(config, storage, tell).kept() as runs:
        yield runs


@contextmanager
def traced(config: SweepConfig, run_dir: str, strategy: str, variant: str) -> Iterator[None]:
    """Have MLflow trace what DSPy does in this process, below the trial's run, if that is wanted and MLflow is there."""
    end: Callable[[], None] | None = None
    if config.tracking.mlflow is not None and config.tracking.autolog:
        try:
            end = _trace(config, run_dir, step_label(strategy, variant))
        except Exception as error:  # MLflow's own, those of requests, of SQLAlchemy
            logger.warning("MLflow traces nothing of this trial: %s: %s", type(error).__name__, error)
    try:
        yield
    finally:
        if end is not None:
            with contextlib.suppress(Exception):  # what is not told by now costs no result
                end()


def _trace(config: SweepConfig, run_dir: str, trial: str) -> Callable[[], None]:
    """Begin to trace; returns what ends it."""
    client = _client(config)  # the environment comes first
    import mlflow
    import mlflow.dspy

    mlflow.set_tracking_uri(config.tracking.mlflow)
    experiment = _experiment(client, config)
    mlflow.set_experiment(experiment_id=experiment)
    if (run_id := _await_run(lambda: _runs(client, experiment, run_dir).get(trial))) is not None:
        mlflow.start_run(run_id=run_id)
    mlflow.dspy.autolog(log_traces_from_compile=True, silent=True)  # a trial is one compilation, of BetterTogether

    def end() -> None:
        mlflow.flush_trace_async_logging()
        mlflow.end_run()

    return end


def _await_run(run_id: Callable[[], str | None]) -> str | None:
    """A run's id as soon as there is one; None if there is none in time."""
    none = retry_if_result(lambda found: found is None)
    return Retrying(retry=none, wait=wait_fixed(0.5), stop=stop_after_delay(RUN_S), retry_error_callback=lambda _: None)(
        run_id
    )


def _client(config: SweepConfig) -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # it tells of the tables that it makes in a new database
    return MlflowClient(config.tracking.mlflow)


def _sweep_tag(run_dir: str) -> str:
    return hashlib.sha256(run_dir.encode()).hexdigest()[:16]


def _experiment(client: Any, config: SweepConfig) -> str:
    """The id of the experiment, which is made if there is none."""
    name = config.tracking.experiment or _name(config)
    found = client.get_experiment_by_name(name)
    experiment: str = found.experiment_id if found is not None else client.create_experiment(name)
    return experiment


def _runs(client: Any, experiment: str, run_dir: str) -> dict[str, str]:
    """The runs of a sweep by their trials' names; its own by `""`."""
    query = f"tags.`{SWEEP_TAG}` = '{_sweep_tag(run_dir)}'"
    return {run.data.tags[TRIAL_TAG]: run.info.run_id for run in client.search_runs([experiment], query, max_results=10_000)}


def _name(config: SweepConfig) -> str:
    """Of the task's file or module."""
    return Path(config.task.rpartition(":")[0]).stem.rpartition(".")[2]


def _report(storage: Storage) -> str:
    from bt_ray.report.data import read_report
    from bt_ray.report.page import report_page

    return report_page(read_report(storage))
