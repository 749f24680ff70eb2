"""What a sweep will compute, before anything is paid for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from bt_ray.run_dir.step_store import FinishedStep
from bt_ray.step import StepKey
from bt_ray.strategy import BASELINE, SEPARATOR, length, prefixes


@dataclass(frozen=True)
class Estimate:
    """What computing something takes, as far as earlier steps tell.

    Attributes:
        requests: To the model servers.
        tokens: In and out, of the steps that finished ones are like.
        seconds: On one server, one step after the other.
        unknown: The steps that no finished step is like: nothing tells what they take beyond their evaluation.
    """

    requests: int
    tokens: int
    seconds: float
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a sweep will compute.

    Attributes:
        steps: All steps by label, each after its parent.
        finished: Those that are finished, by label.
        one_by_one: Steps, and baselines, that the trials would take without sharing.
        estimate: What the others take.
    """

    steps: dict[str, StepKey]
    finished: dict[str, FinishedStep]
    one_by_one: tuple[int, int]
    estimate: Estimate

    @property
    def new(self) -> list[str]:
        return [label for label in self.steps if label not in self.finished]

    @property
    def baselines(self) -> int:
        return sum(key.prefix == BASELINE for key in self.steps.values())

    @property
    def trainings(self) -> list[str]:
        """The new steps that fine-tune."""
        return [label for label in self.new if self.steps[label].trains]

    def to_json(self) -> dict[str, Any]:
        """Each step with its key, what that is made of, whether it is finished, and where it is taken from if elsewhere."""
        steps = []
        for label, key in self.steps.items():
            step = self.finished.get(label)
            found = {"finished": step is not None, "origin": step.origin if step is not None else ""}
            steps.append({"label": label, **key.to_json(), **found})
        return {"steps": steps}


def make_plan(
    trials: Sequence[str], keys: Mapping[str, StepKey], finished: Mapping[str, FinishedStep], evaluation_requests: int
) -> Plan:
    """The plan for a sweep.

    Args:
        trials: The strategy of each of its trials.
        keys: The key of each step, by label.
        finished: The finished ones, by label.
        evaluation_requests: Requests that one evaluation on the valset takes.
    """
    steps = dict(sorted(keys.items(), key=lambda item: length(item[1].prefix)))
    new = [key for label, key in steps.items() if label not in finished]
    alone = sum(len(prefixes(strategy)) for strategy in trials)
    return Plan(steps, dict(finished), (alone, len(trials)), _estimate(new, finished.values(), evaluation_requests))


def _estimate(new: Sequence[StepKey], finished: Collection[FinishedStep], evaluation_requests: int) -> Estimate:
    requests, tokens, seconds, unknown = 0, 0, 0.0, []
    for key in new:
        alike = [step for step in finished if _optimizer(step.prefix) == _optimizer(key.prefix)]
        if alike:
            requests += round(mean(step.requests for step in alike))
            tokens += round(mean(step.prompt_tokens + step.completion_tokens for step in alike))
            seconds += mean(step.seconds for step in alike)
        else:
            requests += evaluation_requests
            unknown.append(key.prefix)
    return Estimate(requests, tokens, seconds, tuple(dict.fromkeys(unknown)))


def _optimizer(prefix: str) -> str:
    return prefix.rpartition(SEPARATOR)[2] if prefix != BASELINE else BASELINE
