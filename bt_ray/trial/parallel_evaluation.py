"""Evaluations spread over processes, where Python's own work in one is what bounds them.

Each process has some of the examples, a program rebuilt from its state, and leases of its own. The metric's values come
together in the examples' order, as if one process had found them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from bt_ray.errors import InfrastructureError, InfrastructureFailure, TaskError
from bt_ray.layout import TRIAL_LOG
from bt_ray.trial.setup import Student, TrialSetup, dspy_settings, log_file, open_student, work_folder
from bt_ray.weights import Weights

if TYPE_CHECKING:
    import dspy

    from bt_ray.trial.evaluation import Evaluator, Limits, Scores
    from bt_ray.trial.lm import Usage
    from bt_ray.trial.program_lms import ServedModels

T = TypeVar("T")
CLOSE_S = 10.0
"""Seconds that a process has to keep its log when its trial ends."""


@dataclass(frozen=True)
class SavedProgram:
    """A program as another process rebuilds it.

    Attributes:
        state: As `bt_ray.trial.program_state.program_state` makes it.
        weights: The id of the weights that each predictor with a served LM uses, by the predictor's name.
        api_models: The model of each other predictor's LM.
        known: These weights, by id.
    """

    state: bytes
    weights: Mapping[str, str]
    api_models: Mapping[str, str]
    known: Mapping[str, Weights]

    @classmethod
    def of(cls, program: "dspy.Module", task_program: "dspy.Module", known: Mapping[str, Weights]) -> "SavedProgram":
        from bt_ray.trial.program_lms import api_models_of, weights_of
        from bt_ray.trial.program_state import program_state

        weights = weights_of(program)
        used = {weights_id: known[weights_id] for weights_id in weights.values()}
        return cls(program_state(program, task_program), weights, api_models_of(program), used)

    def rebuilt(self, task_program: "dspy.Module", models: "ServedModels") -> "dspy.Module":
        """The program, from the one that the task gives."""
        from bt_ray.trial.steps import rebuilt

        return rebuilt(task_program, self.state, self.weights, self.api_models, models, self.known.__getitem__)


@ray.remote
class EvaluatingProcess:
    """Evaluates its part of the examples.

    Args:
        setup: What the trial knows.
        holder: Its name, for the pool.
        folder: Its own folder below the run directory, for its log.
    """

    def __init__(self, setup: TrialSetup, holder: str, folder: str) -> None:
        from bt_ray.trial.evaluation import LocalEvaluator

        self._setup = setup
        self._opened = ExitStack()
        here = self._opened.enter_context(work_folder(setup.store.storage, folder))
        self._opened.enter_context(log_file(here / TRIAL_LOG))
        threads = setup.config.num_threads
        self._refused: TaskError | None = None
        try:
            student = self._opened.enter_context(open_student(setup, holder, threads))
        except TaskError as error:  # an actor whose `__init__` raises would count as lost
            self._refused = error
            return
        self._models, self._hosted, self._latch = student.models, student.hosted, student.latch
        self._program = student.task.program
        self._evaluator = LocalEvaluator(student.task.metric, student.latch)
        self._evaluations = 0

    def check(self) -> None:
        """Raises `TaskError` if the task cannot be loaded, or is not the one that the driver made the keys of."""
        if self._refused is not None:
            raise self._refused

    def scores(
        self, saved: SavedProgram, examples: "Sequence[dspy.Example]", limits: "Limits", urgency: int
    ) -> "tuple[Scores, Usage]":
        """The scores of these examples, and what their answers took.

        Args:
            saved: The program.
            examples: The examples.
            limits: As `bt_ray.trial.evaluation.Evaluator` has them.
            urgency: Of the trial's leases.

        Raises:
            BtRayError: As `bt_ray.trial.evaluation.Evaluator`.
        """
        import dspy

        from bt_ray.trial.lm import STEP_SETTING

        engine, program = self._models.engine, saved.rebuilt(self._program, self._models)
        self._latch.release()
        self._hosted.urgency = urgency
        self._evaluations += 1
        engine.step, before = str(self._evaluations), engine.usage
        try:
            with dspy.context(**dspy_settings(self._setup.config), **{STEP_SETTING: engine.step}):
                scores = self._evaluator.scores(program, examples, limits)
            self._latch.check()
        except InfrastructureFailure as failure:
            raise InfrastructureError(str(failure)) from failure
        finally:
            self._hosted.give_back()
        return scores, engine.usage.since(before)

    def close(self) -> None:
        """Keep the log, and give back what is leased."""
        self._opened.close()


@contextmanager
def opened_evaluator(setup: TrialSetup, student: Student, *, name: str, folder: str) -> "Iterator[Evaluator]":
    """The evaluator of a trial, in as many processes as the settings say.

    Args:
        setup: What the trial knows.
        student: Its task and models.
        name: The trial's name, for the pool.
        folder: The trial's folder below the run directory.
    """
    from bt_ray.trial.evaluation import LocalEvaluator

    own = LocalEvaluator(student.task.metric, student.latch)
    if setup.config.trial.processes == 1:
        yield own
        return
    spread_over_all = SpreadEvaluator(own, student, setup, name=name, folder=folder)
    try:
        yield spread_over_all
    finally:
        spread_over_all.close()


class SpreadEvaluator:
    """`bt_ray.trial.evaluation.Evaluator` of this process and others.

    Args:
        own: Evaluates in this process.
        student: The task, whose program is copied, and its models; their engine is told what the answers of the others took.
        setup: What the trial knows.
        name: The trial's name, for the pool.
        folder: The trial's folder below the run directory.
    """

    def __init__(self, own: "Evaluator", student: Student, setup: TrialSetup, *, name: str, folder: str) -> None:
        self._own, self._setup = own, setup
        self._models, self._hosted = student.models, student.hosted
        self._program = student.task.program.deepcopy()
        self._name, self._folder = name, folder
        self._others: list[Any] = []
        self._checked = False
        self._start()

    def scores(self, program: "dspy.Module", examples: "Sequence[dspy.Example]", limits: "Limits") -> "Scores":
        from bt_ray.trial.evaluation import Scores, explain_stop

        self._start()
        self._hosted.give_back()  # what this process has may be what the others ask for
        parts = split_examples(examples, 1 + len(self._others))
        threads = shares(limits.num_threads or self._setup.config.num_threads, len(parts))
        bounds = [replace(limits, num_threads=share) for share in threads]
        saved = SavedProgram.of(program, self._program, self._hosted.weights)
        try:
            self._check()
            asked = [
                other.scores.remote(saved, part, bound, self._hosted.urgency)
                for other, part, bound in zip(self._others, parts[1:], bounds[1:], strict=False)
            ]
            found = [self._own.scores(program, parts[0], bounds[0])]
            for promise in asked:
                scores, usage = _answer(promise)
                self._models.engine.add(usage)
                found.append(scores)
        except BaseException:
            self._end()  # what they still evaluate is of no use
            raise
        errors = tuple(error for scores in found for error in scores.errors)
        if len(errors) >= limits.most_errors:
            raise explain_stop(limits)
        return Scores(gather([scores.of_examples for scores in found]), errors)

    def close(self) -> None:
        """End the other processes."""
        with contextlib.suppress(Exception):  # what they did is told already, and they end with the trial anyway
            ray.wait([other.close.remote() for other in self._others], num_returns=len(self._others), timeout=CLOSE_S)
        self._end()

    def _start(self) -> None:
        if not self._others:
            trial = self._setup.config.trial
            self._others = [
                EvaluatingProcess.options(num_cpus=trial.cpus).remote(  # type: ignore[attr-defined]
                    self._setup, f"{self._name}, process {number}", f"{self._folder}/process-{number}"
                )
                for number in range(2, trial.processes + 1)
            ]

    def _check(self) -> None:
        """Wait for the others to have the task, before the first request is paid for."""
        if not self._checked:
            for other in self._others:
                _answer(other.check.remote())
            self._checked = True

    def _end(self) -> None:
        for other in self._others:
            ray.kill(other)
        self._others, self._checked = [], False


def _answer(promise: Any) -> Any:
    """What another process found; what it raised is raised as it was there. Ray's own errors say that it is lost."""
    try:
        return ray.get(promise)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def split_examples(examples: Sequence[T], parts: int) -> list[Sequence[T]]:
    """The examples in so many parts, as equal as can be, none of them empty."""
    return [examples[number::parts] for number in range(min(parts, len(examples)))]


def gather(parts: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """What was found for the examples of each part of `split_examples`, in the order of the examples."""
    return tuple(parts[n % len(parts)][n // len(parts)] for n in range(sum(map(len, parts))))


def shares(total: int, parts: int) -> list[int]:
    """A number of threads in so many parts, as equal as can be, of one at least."""
    return [max(1, total // parts + (number < total % parts)) for number in range(parts)]
