"""The driver of a sweep: check, place the servers, let Ray Tune run the trials, rank, keep the best, test it."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bt_ray.driver.check import CheckedSweep, check_sweep
from bt_ray.driver.cpu_cost import describe_here
from bt_ray.driver.ray_session import Listener, cause_of, connected, inside_job, opened_pool, step_claims, watched
from bt_ray.driver.search import SearchWalk
from bt_ray.driver.tune import Trial, run_search, run_trials
from bt_ray.errors import ConfigError, InfrastructureError, TaskError
from bt_ray.events import Event, Stage, StepFinished, TrialEnded, TrialWaits
from bt_ray.layout import RESULT, TRIALS
from bt_ray.run_dir.examples import examples_file, keep_examples
from bt_ray.run_dir.lock import held
from bt_ray.run_dir.results import Candidate, StepFailure, SweepResult, TrialResult, best_so_far
from bt_ray.run_dir.reuse import find_sources, take_steps
from bt_ray.run_dir.run_directory import VariantSteps, prepare_run_directory
from bt_ray.run_dir.status_file import StatusFile
from bt_ray.run_dir.step_store import FinishedStep, StepStore
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.settings.config import StrategySearch, SweepConfig, make_config
from bt_ray.settings.toml import with_absolute_paths
from bt_ray.strategy import BASELINE, parent, prefixes, start_order
from bt_ray.task.fingerprint import digest, find_places
from bt_ray.task.task import TaskFunction, task_spec
from bt_ray.tracking.mlflow_runs import mlflow_runs
from bt_ray.weights import find_hub_models
from bt_ray.winner.load import keep_best

if TYPE_CHECKING:
    from bt_ray.trial.setup import TrialSetup

CLAIMS_PER_DRIVER = 1_000_000
"""Claims are numbered from this multiple of how many drivers the run directory has seen, so none is numbered twice."""


def sweep(
    task: str | TaskFunction,
    config: SweepConfig | Mapping[str, Any],
    *,
    run_dir: str | Path | None = None,
    address: str | None = None,
    listener: Listener | None = None,
    accept_changes: bool = False,
) -> SweepResult:
    """Run every strategy of `config` on `task`, and return the ranked result.

    Args:
        task: `"module:function"`, `"path/to/file.py:function"`, or the function itself, of a notebook's cell, say, which
            then travels to the trials with all that it refers to in there. Replaces `config`'s.
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
    build = None if isinstance(task, str) else task
    values |= {"task": task if isinstance(task, str) else task_spec(task)}
    values |= {"run_dir": str(run_dir)} if run_dir is not None else {}
    values = with_absolute_paths(values, Path.cwd(), refuse_relative=inside_job())
    config = make_config(values)
    return run_sweep(config, address=address, listener=listener, accept_changes=accept_changes, build=build)


def run_sweep(
    config: SweepConfig,
    *,
    address: str | None = None,
    listener: Listener | None = None,
    accept_changes: bool = False,
    build: TaskFunction | None = None,
) -> SweepResult:
    """`sweep` with everything in `config`, except for a task's function that is given rather than named."""
    tell = listener or (lambda event: None)
    tell(Stage("Checking the task"))
    run_dir = run_directory(config)
    config = config.model_copy(update={"run_dir": run_dir})
    if build is not None:
        _check_travels(build)
    checked = check_sweep(config, run_dir, accept_changes=accept_changes, build=build)
    for line in describe_here(config, checked.first.task, checked.bases.values(), address):
        tell(Stage(line))
    storage = open_storage(run_dir)
    with held(storage, lambda text: tell(Stage(text))) as drivers:
        prepare_run_directory(storage, config, checked.keys, variant_steps(checked), checked.bases)
        for line in _take_reused(config, storage, checked, drivers * CLAIMS_PER_DRIVER):
            tell(Stage(line))
        for file, examples in _validation_examples(checked).items():
            keep_examples(storage, file, examples)
        with StatusFile(storage).kept() as status, mlflow_runs(config, storage, tell) as runs:
            listeners = [status.note, *([runs.note] if runs is not None else []), tell]

            def tell_all(event: Event) -> None:
                for told in listeners:
                    told(event)

            sweep = _Sweep(config, run_dir, checked, tell_all, build or portable_task(config.task))
            result = sweep.run(address, first_fence=drivers * CLAIMS_PER_DRIVER)
            if runs is not None:
                runs.finish(result)
            return result


class _Sweep:
    """One run of a sweep, in its run directory."""

    def __init__(
        self, config: SweepConfig, run_dir: str, checked: CheckedSweep, tell: Listener, task: str | TaskFunction
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.checked = checked
        self.task = task
        self.tell = tell
        self.store = StepStore(open_storage(run_dir))
        self.started = time.time()
        self.search = self.open_search()
        named = [(strategy, name) for name, variant in checked.variants.items() for strategy in variant.strategies]
        self.trials = [Trial(number, *about) for number, about in enumerate(named)] if self.search is None else []

    def run(self, address: str | None, first_fence: int) -> SweepResult:
        """Compute what is not finished, keep the best, and test it."""
        keys = {key.key for key in self.checked.keys.values()}
        finished = self.read_finished()
        done = {step.key for steps in finished.values() for step in steps.values()}
        if done:
            self.tell(Stage(f"{len(done)} of {len(keys)} steps are finished already, the baseline included"))
        complete = done == keys if self.search is None else self.search.is_over
        if complete:
            result = self.with_known_tests(self.gather_result({}))
            if not self.find_untested(result):
                self.keep(result)
                return result
        with (
            connected(address, self.tell) as own,
            self.pool(own, finished) as pool,
            step_claims(done, first_fence) as claims,
        ):
            setups = self.setups(pool, claims)
            with watched(pool, self.store.storage, self.tell) if pool is not None else nullcontext():
                errors = {} if complete else self.compute(finished, setups)
                result = self.with_known_tests(self.gather_result(errors))
                self.keep(result)
                if untested := self.find_untested(result):
                    self.test(untested, setups)
                    result = self.with_known_tests(result)
                    self.keep(result)
        return result

    def open_search(self) -> SearchWalk | None:
        """The search over strategies, if the sweep is one."""
        settings = self.config.strategies
        if not isinstance(settings, StrategySearch):
            return None
        optimizers = settings.optimizers or tuple(self.checked.first.optimizers)
        gpus, seed = self.config.student_server.gpus, self.config.seed
        return SearchWalk(settings, optimizers, self.read_finished()[""], gpus=gpus, seed=seed)

    def compute(
        self, finished: Mapping[str, Mapping[str, FinishedStep]], setups: "Mapping[str, TrialSetup]"
    ) -> dict[Trial, Exception]:
        """Compute what is missing; the errors of trials that were lost."""
        if self.search is None:
            return run_trials(self.order_waiting(finished), setups, self.checked.servers, self.tell)
        lost = run_search(self.search, setups[""], self.checked.servers, self.tell)
        self.trials = [Trial(number, strategy) for number, strategy in enumerate(self.search.strategies)]
        return {trial: lost[trial.strategy] for trial in self.trials if trial.strategy in lost}

    def collect_searched(self, finished: Mapping[str, FinishedStep]) -> list[Trial]:
        """The trials of a search: those of this run, and the paths of steps that were finished before."""
        walked = {prefix for trial in self.trials for prefix in prefixes(trial.strategy)}
        parents = {parent(prefix) for prefix in finished}
        before = [prefix for prefix in finished if prefix not in walked | parents]
        return [*self.trials, *(Trial(len(self.trials) + number, prefix) for number, prefix in enumerate(before) if prefix)]

    def pool(self, own: bool, finished: Mapping[str, Mapping[str, FinishedStep]]) -> AbstractContextManager[Any]:
        """The pool of model servers; none where all LMs are APIs'."""
        checked = self.checked
        if not checked.bases:
            return nullcontext()
        first = checked.asked_first if any(BASELINE not in steps for steps in finished.values()) else {}
        return opened_pool(self.config, self.run_dir, checked.models_at_once, first, own, self.tell)

    def setups(self, pool: Any, claims: Any) -> "dict[str, TrialSetup]":
        """What trials need to know, by variant."""
        from bt_ray.trial.setup import TrialSetup

        variants, places = self.checked.variants.items(), find_places(self.config.task)
        of_the_hub = find_hub_models(self.checked.bases.values())
        return {
            name: TrialSetup(
                checked.config,
                self.task,
                self.run_dir,
                checked.keys,
                places,
                self.testset_digests[name],
                pool,
                claims,
                of_the_hub,
            )
            for name, checked in variants
        }

    def read_finished(self) -> dict[str, dict[str, FinishedStep]]:
        """The finished steps of each variant's strategies, by prefix."""
        bases, variants = self.checked.bases, self.checked.variants.items()
        return {
            name: self.store.find_finished({p: k.key for p, k in checked.keys.items()}, bases) for name, checked in variants
        }

    def order_waiting(self, finished: Mapping[str, Mapping[str, FinishedStep]]) -> list[Trial]:
        """The trials that lack a step, in the order in which to start them; of the others, their steps are told."""
        paths = {trial: [BASELINE, *prefixes(trial.strategy)] for trial in self.trials}
        for trial in self.trials:
            self.tell(TrialWaits(trial.strategy, trial.variant))
        complete = [trial for trial in self.trials if finished[trial.variant].keys() >= set(paths[trial])]
        for trial in complete:
            self.tell_finished(trial, [finished[trial.variant][prefix] for prefix in paths[trial]])
        keys = {variant: checked.keys for variant, checked in self.checked.variants.items()}
        left = {
            trial: [keys[trial.variant][prefix].key for prefix in path]
            for trial, path in paths.items()
            if trial not in complete
        }
        done = {step.key for steps in finished.values() for step in steps.values()}
        return start_order(left, done, {step.key for steps in keys.values() for step in steps.values() if step.trains})

    def tell_finished(self, trial: Trial, steps: Sequence[FinishedStep]) -> None:
        for step, best in zip(steps, best_so_far(step.score for step in steps), strict=True):
            told = (step.prefix, step.score, best, step.seconds, True, trial.variant, step.example_errors)
            self.tell(StepFinished(trial.strategy, *told))

    def gather_result(self, errors: Mapping[Trial, Exception]) -> SweepResult:
        """What is on the store, as the result. `errors`: of trials that were lost."""
        finished, results = self.read_finished(), []
        for trial in self.trials if self.search is None else self.collect_searched(finished[""]):
            found, values = finished[trial.variant], self.checked.variants[trial.variant].values
            steps = list(takewhile(bool, (found.get(prefix) for prefix in [BASELINE, *prefixes(trial.strategy)])))
            valset = self.checked.variants[trial.variant].keys[BASELINE].valset
            candidates = tuple(step.candidate(trial.strategy, trial.variant, valset) for step in steps if step)
            failure = None if trial.strategy in found else self.failure(trial, errors.get(trial))
            message, traceback = (failure.message, failure.traceback) if failure else (None, None)
            results.append(TrialResult(trial.strategy, candidates, message, traceback, values))
            self.tell(TrialEnded(trial.strategy, results[-1].error, trial.variant))
        result = SweepResult(self.run_dir, tuple(results), time.time() - self.started)
        if self.search is None:
            return result
        return replace(result, skipped=self.search.find_skipped(), believed=self.search.find_believed())

    def failure(self, trial: Trial, error: Exception | None) -> StepFailure:
        """Why a trial did not get to its end: what it recorded itself, or how it was lost."""
        from bt_ray.layout import TRIAL_FAILURE

        recorded = self.store.storage.read_json(f"{TRIALS}/{trial.folder}/{TRIAL_FAILURE}")
        if recorded is not None:
            return StepFailure(**recorded)
        error = error or InfrastructureError("The trial was lost before its end.")
        return StepFailure(cause_of(error), str(error))

    def to_test(self, result: SweepResult) -> dict[str, Candidate]:
        """What is evaluated on the testset, by the file of its score: the best of each strategy, and what the sweep and a
        search take for the best of all. A search walks many strategies, so of them only those two.
        """
        chosen = [trial.best for trial in result.trials] if self.search is None else [result.best]
        if (believed := result.believed) is not None:
            chosen += [candidate for candidate in result.candidates if candidate.prefix == believed.prefix]
        files = {self.test_file(candidate): candidate for candidate in chosen if candidate is not None}
        return {file: candidate for file, candidate in files.items() if file}

    def find_untested(self, result: SweepResult) -> dict[str, Candidate]:
        return {file: candidate for file, candidate in self.to_test(result).items() if candidate.test_score is None}

    def with_known_tests(self, result: SweepResult) -> SweepResult:
        """The result with the scores on the testset that are on the store."""
        known = {file: self.store.storage.read_json(file) for file in self.to_test(result)}

        def add_test_score(candidate: Candidate) -> Candidate:
            scores, testset = known.get(self.test_file(candidate)), self.testset_digests[candidate.variant]
            if not scores:
                return candidate
            return replace(candidate, test_score=scores[0], test_example_scores=tuple(scores[1]), testset=testset)

        trials = [replace(trial, candidates=tuple(map(add_test_score, trial.candidates))) for trial in result.trials]
        return replace(result, trials=tuple(trials))

    def test_file(self, candidate: Candidate) -> str:
        """Where the score of a program on the testset is kept; `""` without a testset."""
        variant = self.checked.variants[candidate.variant]
        testset = self.testset_digests[candidate.variant]
        return f"tests/{variant.keys[candidate.prefix].key}-{testset}.json" if testset else ""

    @cached_property
    def testset_digests(self) -> dict[str, str]:
        """Of each variant's testset; `""` where there is none."""
        testsets = {name: list(checked.task.testset or ()) for name, checked in self.checked.variants.items()}
        return {name: digest(testset) if testset else "" for name, testset in testsets.items()}

    def test(self, candidates: Mapping[str, Candidate], setups: "Mapping[str, TrialSetup]") -> None:
        """Evaluate candidates on the testset, and keep their scores in the given files.

        Raises:
            InfrastructureError: An evaluation was lost. The others are kept.
        """
        from bt_ray.trial.trial import run_tests

        what = "the best program" if len(candidates) == 1 else f"the best of each strategy, {len(candidates)} programs,"
        self.tell(Stage(f"Scoring {what} on the testset"))
        at_once = self.config.concurrent_trials(len(candidates), self.checked.servers)
        for file, scores in run_tests({file: (setups[c.variant], c) for file, c in candidates.items()}, at_once):
            self.store.storage.write_json(file, scores)

    def keep(self, result: SweepResult) -> None:
        self.store.storage.write_json(RESULT, result.to_json())
        if (best := result.best) is not None:
            config = self.checked.variants[best.variant].config
            keep_best(best, self.store.storage, self.checked.bases, config, config.task)


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


def _take_reused(config: SweepConfig, storage: Storage, checked: CheckedSweep, fence: int) -> list[str]:
    """Take the steps that are missing from the directories that the settings name; what was taken from where, in words."""
    if not config.reuse:
        return []
    store, keys = StepStore(storage), {key.key: key.key for key in checked.keys.values()}
    missing = keys.keys() - store.find_finished(keys, checked.bases).keys()
    return take_steps(find_sources(config, missing, checked.bases), store, config, checked.bases, fence)


def variant_steps(checked: CheckedSweep) -> dict[str, VariantSteps]:
    """The steps of each variant, as the run directory names them."""
    variants = checked.variants.items()
    return {name: VariantSteps(v.values, {prefix: key.key for prefix, key in v.keys.items()}) for name, v in variants}


def _validation_examples(checked: CheckedSweep) -> dict[str, list[Any]]:
    """What the variants are evaluated on, by the file where it is kept; nothing of those without validation."""
    found = {}
    for variant in checked.variants.values():
        if examples := variant.task.validation_examples(variant.config.valset_ratio):
            found[examples_file(variant.keys[BASELINE])] = examples
    return found


def _check_travels(build: TaskFunction) -> None:
    """Raises `TaskError` if a task's function cannot be sent to other processes."""
    from ray import cloudpickle

    try:
        cloudpickle.dumps(build)
    except Exception as error:
        raise TaskError(
            f"{task_spec(build)} cannot be sent to the trials: {type(error).__name__}: {error}. Make what it refers to "
            "inside of it, or move it to a file."
        ) from error


def portable_task(task: str) -> str:
    """The task's spec as a worker resolves it: inside a job relative to the working directory, which each node has."""
    where, _, function = task.rpartition(":")
    path = Path(where)
    if inside_job() and path.is_absolute() and path.is_relative_to(Path.cwd()):
        return f"{path.relative_to(Path.cwd())}:{function}"
    return task
