"""One trial: a strategy from start to end, and the evaluation of the winner on the testset.

Runs in a Ray Tune worker (or a Ray task): loads the task anew, wires its LMs to the pool, lets BetterTogether walk the
strategy, keeps each step's program and reports each step's score.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bt_ray.errors import BtRayError, InfrastructureError, InfrastructureFailure
from bt_ray.layout import SCRATCH, TRIAL_FAILURE, TRIAL_LOG, TRIALS
from bt_ray.pool.metrics import TrialMetrics
from bt_ray.run_dir.results import Candidate, StepFailure, failure_of
from bt_ray.run_dir.step_store import FinishedStep
from bt_ray.strategy import BASELINE, SEPARATOR, prefixes, steps_to_come
from bt_ray.tracking.mlflow_runs import traced
from bt_ray.trial.failures import Side, side_of
from bt_ray.trial.parallel_evaluation import opened_evaluator
from bt_ray.trial.setup import TrialSetup, dspy_settings, log_file, student, work_folder

logger = logging.getLogger(__name__)


def run_trial(params: dict[str, Any], setups: Mapping[str, TrialSetup]) -> None:
    """Ray Tune's trainable: walk the strategy of `params["trial"]` under its variant, keep and report each step.

    A failure of the user's is kept in the trial's folder. Lost infrastructure is raised, and Ray Tune runs the trial again.
    """
    trial = params["trial"]
    strategy, folder, setup = trial["strategy"], f"{TRIALS}/{trial['folder']}", setups[trial["variant"]]
    with (
        work_folder(setup.store.storage, folder) as here,
        log_file(here / TRIAL_LOG),
        traced(setup.config, setup.run_dir, strategy, trial["variant"]),
    ):
        reporter = _Reporter(setup.run_dir)
        try:
            failure = _walk(strategy, setup, folder, here, reporter)
        except InfrastructureFailure as lost:
            raise InfrastructureError(str(lost)) from lost
        except Exception as error:
            if side_of(error) is Side.INFRASTRUCTURE:
                raise
            failure = failure_of(error)
        if failure is not None:
            setup.store.storage.write_json(f"{folder}/{TRIAL_FAILURE}", asdict(failure))
        reporter.finish()


def _walk(strategy: str, setup: TrialSetup, folder: str, work_folder: Path, reporter: "_Reporter") -> StepFailure | None:
    """Walk the strategy; returns how the step failed that ended it early, None if it went to its end."""
    import dspy

    from bt_ray.trial.better_together import SweepBetterTogether
    from bt_ray.trial.claims_actor import RemoteClaims
    from bt_ray.trial.lm import student_lm
    from bt_ray.trial.steps import KeptSteps

    config, name, to_come = setup.config, f"trial {strategy}", steps_to_come(setup.keys)
    with (
        student(setup, name, config.num_threads, prefixes(strategy)) as (task, models, hosted),
        opened_evaluator(setup, task, models, hosted, name=name, folder=folder) as evaluator,
    ):

        def on_claim(prefix: str) -> None:
            hosted.urgency = to_come[prefix]

        steps = KeptSteps(
            setup.store,
            RemoteClaims(setup.claims),
            setup.keys,
            task.program,
            models,
            give_back=hosted.give_back,
            on_claim=on_claim,
            on_step=reporter.report,
        )
        optimizer = SweepBetterTogether(
            task,
            student_lm(task.program),
            seed=config.seed,
            scratch_dir=lambda prefix: scratch_dir(setup, work_folder, prefix),
            engine=models.engine,
            evaluator=evaluator,
            steps=steps,
            retries=config.trial.step_retries,
        )
        with dspy.context(**dspy_settings(config)):
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
    def score(self, setup: TrialSetup, best: Candidate) -> "Tested":
        """The program's score on the task's testset, in percent, and the metric's value for each example."""
        try:
            return _evaluate_on_testset(setup, best)
        except InfrastructureFailure as failure:
            raise InfrastructureError(str(failure)) from failure


Tested = tuple[float, tuple[float, ...]]
"""A program's score, in percent, and the metric's value for each example."""


def run_tests(candidates: Mapping[str, tuple[TrialSetup, Candidate]], at_once: int) -> Iterator[tuple[str, Tested]]:
    """The scores of candidates on the testset, by name, as they come.

    Args:
        candidates: The candidates, with their setups.
        at_once: How many are evaluated at the same time.

    Raises:
        BtRayError: An evaluation was lost, after all others came.
    """
    waiting = list(candidates.items())
    running: dict[Any, tuple[str, Any, PlacementGroup]] = {}
    lost: BtRayError | None = None
    while waiting or running:
        while waiting and len(running) < at_once:
            name, (setup, candidate) = waiting.pop(0)
            evaluation, room = _place_test(setup)
            running[evaluation.score.remote(setup, candidate)] = (name, evaluation, room)
        (done,), _ = ray.wait(list(running))
        name, _, room = running.pop(done)
        try:
            scores: Tested = ray.get(done)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            lost = cause if isinstance(cause, BtRayError) else InfrastructureError(f"A test was lost: {error}")
        else:
            yield name, scores
        finally:
            remove_placement_group(room)
    if lost is not None:
        raise lost


def _place_test(setup: TrialSetup) -> tuple[Any, PlacementGroup]:
    """An actor for a test, and the room for all its processes, as Ray Tune makes it for a trial."""
    trial = setup.config.trial
    room = placement_group([{"CPU": trial.cpus}] * trial.processes)
    where = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=0, placement_group_capture_child_tasks=True)
    options = {"num_cpus": trial.cpus, "max_restarts": trial.max_failures, "scheduling_strategy": where}
    return TestEvaluation.options(**options).remote(), room  # type: ignore[attr-defined]


def _evaluate_on_testset(setup: TrialSetup, best: Candidate) -> Tested:
    import dspy

    from bt_ray.trial.evaluation import Limits
    from bt_ray.trial.program_lms import assign_versions
    from bt_ray.trial.program_state import load_state
    from bt_ray.trial.task_check import refuse_other_testset

    config, name = setup.config, f"test of {best.prefix or 'baseline'}"
    folder = f"{TRIALS}/test-{setup.keys[best.prefix].key[:12]}"
    with (
        work_folder(setup.store.storage, folder) as here,
        log_file(here / TRIAL_LOG),
        student(setup, name, config.num_threads) as (task, models, hosted),
        opened_evaluator(setup, task, models, hosted, name=name, folder=folder) as evaluator,
    ):
        testset = list(task.testset or ())
        refuse_other_testset(setup.task, testset, setup.testset)
        assign_versions(task.program, best.weights, best.api_models, models, setup.store.read_weights)
        load_state(task.program, setup.store.read_program(best.program))
        limits, latch = Limits(config.num_threads, max_errors=len(testset) + 1), models.engine.latch

        def attempt() -> Tested:
            with dspy.context(**dspy_settings(config)):
                scores = evaluator.scores(task.program, testset, limits)
            latch.check()
            return scores.percent, scores.of_examples

        tested: Tested = latch.retry(attempt, config.trial.step_retries, "The test")
        return tested


class _Reporter:
    """Tells Ray Tune what each step gave."""

    def __init__(self, run_dir: str) -> None:
        self._best: float | None = None
        self._reported = False
        self._metrics = TrialMetrics(run_dir)

    def report(self, step: FinishedStep, loaded: bool) -> None:
        from ray import tune  # a test needs none of it

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
        from ray import tune

        if not self._reported:  # Ray Tune takes a trial that never reported for a lost one
            nothing = {"prefix": BASELINE, "score": None, "best_score": None, "seconds": 0.0, "tokens": 0}
            tune.report({**nothing, "loaded": True, "example_errors": "{}"})


def scratch_dir(setup: TrialSetup, folder: Path, prefix: str) -> Path:
    """The step's folder for its optimizer's own files: empty, unless they are to be found again by the next attempt."""
    if setup.config.trial.resume_optimizers and (run_dir := setup.store.storage.folder) is not None:
        made = run_dir / SCRATCH / setup.keys[prefix].key
    else:
        made = folder / SCRATCH / (prefix.replace(SEPARATOR, "-") or "baseline")
        shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True, exist_ok=True)
    return made
