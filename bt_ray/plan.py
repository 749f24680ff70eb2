"""What a sweep will compute, before anything is paid for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from bt_ray.fingerprint import StepKey
from bt_ray.store import FinishedStep
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
        steps: All steps by prefix, the baseline first, each after its parent.
        finished: Those that are finished, by prefix.
        one_by_one: Steps, and baselines, that the strategies would take without sharing.
        estimate: What the others take.
    """

    steps: dict[str, StepKey]
    finished: dict[str, FinishedStep]
    one_by_one: tuple[int, int]
    estimate: Estimate

    @property
    def new(self) -> list[str]:
        return [prefix for prefix in self.steps if prefix not in self.finished]

    @property
    def trainings(self) -> list[str]:
        """The new steps that fine-tune."""
        return [prefix for prefix in self.new if self.steps[prefix].trains]


def make_plan(
    strategies: Sequence[str], keys: Mapping[str, StepKey], finished: Mapping[str, FinishedStep], evaluation_requests: int
) -> Plan:
    """The plan for `strategies`.

    Args:
        strategies: The sweep's strategies.
        keys: The key of each step and of the baseline, by prefix.
        finished: The finished ones, by prefix.
        evaluation_requests: Requests that one evaluation on the valset takes.
    """
    steps = dict(sorted(keys.items(), key=lambda item: length(item[0])))
    new = [prefix for prefix in steps if prefix not in finished]
    alone = sum(len(prefixes(strategy)) for strategy in strategies)
    return Plan(steps, dict(finished), (alone, len(strategies)), _estimate(new, finished, evaluation_requests))


def _estimate(new: Sequence[str], finished: Mapping[str, FinishedStep], evaluation_requests: int) -> Estimate:
    requests, tokens, seconds, unknown = 0, 0, 0.0, []
    for prefix in new:
        alike = [step for other, step in finished.items() if _optimizer(other) == _optimizer(prefix)]
        if alike:
            requests += round(mean(step.requests for step in alike))
            tokens += round(mean(step.prompt_tokens + step.completion_tokens for step in alike))
            seconds += mean(step.seconds for step in alike)
        else:
            requests += evaluation_requests
            unknown.append(prefix)
    return Estimate(requests, tokens, seconds, tuple(unknown))


def _optimizer(prefix: str) -> str:
    return prefix.rpartition(SEPARATOR)[2] if prefix != BASELINE else BASELINE
