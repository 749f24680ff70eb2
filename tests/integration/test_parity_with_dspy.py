"""One strategy by bt_ray gives what `dspy.BetterTogether` gives, step by step.

The reference is DSPy's class with freshly built optimizers for each step, inside the context of the student's LM. Each
side runs against its own scripted server in a real child process, with an empty DSPy cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import (
    COPRO,
    GEPA,
    SIMBA,
    BootstrapFewShot,
    BootstrapFewShotWithRandomSearch,
    BootstrapFinetune,
    MIPROv2,
)
from support import tasks
from support.reference import reference_run
from support.slot_models import SlotModels
from support.sole_claims import sole_walk

from bt_ray.settings.config import make_config
from bt_ray.task.task import StepContext, Task
from bt_ray.trial.better_together import StepOutcome
from bt_ray.trial.lm import ServedLM, assign_lm

SEED = 3


@dataclass
class Walk:
    """What one side did: the result, the examples in the order in which the metric saw them, and the requests."""

    program: dspy.Module
    seen: list[str]
    requests: list[dict[str, Any]]
    outcomes: list[StepOutcome] = field(default_factory=list)

    @property
    def candidates(self) -> list[tuple[str, float | None, str, list[str]]]:
        """Strategy, score, instruction and demos, in BetterTogether's order."""
        return [
            (
                candidate["strategy"],
                candidate["score"],
                candidate["program"].signature.instructions,
                [demo["question"] for demo in candidate["program"].demos],
            )
            for candidate in self.program.candidate_programs
        ]

    @property
    def generations(self) -> list[tuple[int, str | None, int]]:
        """For each request, in order: how often its weights had been fine-tuned, the question, the demos."""
        order = list(dict.fromkeys(request["weights"] for request in self.requests))
        return [(order.index(r["weights"]), r["question"], r["demos"]) for r in self.requests]


Side = Callable[[Task, ServedLM, dict[str, Any]], tuple[dspy.Module, list[StepOutcome]]]


@pytest.fixture
def walk(settings: dict[str, Any], tmp_path: Path, request_log: Any) -> Iterator[Callable[..., Walk]]:
    hosts: list[SlotModels] = []

    def run(side: Side, arguments: dict[str, Any], **replaced: Any) -> Walk:
        config = make_config(settings)
        models = SlotModels(config, tmp_path / f"side-{len(hosts)}")
        hosts.append(models)
        before = len(request_log())
        seen: list[str] = []

        def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
            seen.append(example.question)
            return tasks.exact(example, prediction, trace)

        task = tasks.double(metric=metric, **replaced)
        lm = models.lm()
        lm.cache = False
        assign_lm(task.program, lm)
        with dspy.context(num_threads=1):
            program, outcomes = side(task, lm, arguments)
        models.kill(lm.weights_id)
        return Walk(program, seen, request_log()[before:], outcomes)

    yield run
    for models in hosts:
        models.close()


def by_dspy(task: Task, lm: ServedLM, arguments: dict[str, Any]) -> tuple[dspy.Module, list[StepOutcome]]:
    program = reference_run(task, lm, SEED, num_threads=1, **arguments)
    return program, []


def by_bt_ray(task: Task, lm: ServedLM, arguments: dict[str, Any]) -> tuple[dspy.Module, list[StepOutcome]]:
    walked = sole_walk(task, lm, seed=SEED, num_threads=1, **arguments)
    return walked.program, walked.outcomes


def only_p_and_w(ctx: StepContext) -> dict[str, Any]:
    return {"p": tasks.Demos(), "w": BootstrapFinetune(metric=tasks.exact), "bad": tasks.Failing()}


def dspys_own(ctx: StepContext) -> dict[str, Any]:
    return {
        "fewshot": BootstrapFewShot(tasks.exact, max_bootstrapped_demos=2, max_labeled_demos=3),
        "search": BootstrapFewShotWithRandomSearch(
            tasks.exact, max_bootstrapped_demos=2, max_labeled_demos=1, num_candidate_programs=1
        ),
        "mipro": MIPROv2(tasks.exact, auto=None, num_candidates=3),
        "gepa": GEPA(tasks.exact, reflection_lm=ctx.lm, max_metric_calls=60, reflection_minibatch_size=10),
        "simba": SIMBA(metric=tasks.exact, bsize=20, num_candidates=2, max_steps=1),
        "copro": COPRO(metric=tasks.exact, breadth=2, depth=2),
        "w": BootstrapFinetune(metric=tasks.exact),
    }


OWN_ARGUMENTS = {"mipro": {"num_trials": 6, "minibatch": False}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"strategy": "p -> w"},
        {"strategy": "p -> w -> p"},
        {"strategy": "w -> p"},
        {"strategy": "p -> p", "shuffle_trainset_between_steps": False},
        {"strategy": "p -> bad -> w"},
    ],
    ids=str,
)
def test_candidates_scores_demos_examples_and_requests_are_the_same(
    walk: Callable[..., Walk], arguments: dict[str, Any]
) -> None:
    theirs = walk(by_dspy, arguments, optimizers=only_p_and_w)
    ours = walk(by_bt_ray, arguments, optimizers=only_p_and_w)
    assert ours.candidates == theirs.candidates
    assert ours.seen == theirs.seen
    assert ours.generations == theirs.generations
    assert ours.program.flag_compilation_error_occurred == theirs.program.flag_compilation_error_occurred
    assert [step.prefix for step in ours.outcomes] == [c["strategy"] for c in sorted_by_length(theirs.program)]
    assert [step.score for step in ours.outcomes] == [c["score"] for c in sorted_by_length(theirs.program)]


@pytest.mark.parametrize("strategy", ["mipro -> w -> gepa", "simba -> fewshot", "copro -> search -> w"])
def test_the_same_holds_for_dspys_own_optimizers(walk: Callable[..., Walk], strategy: str) -> None:
    theirs = walk(by_dspy, {"strategy": strategy}, optimizers=dspys_own, optimizer_compile_args=OWN_ARGUMENTS)
    ours = walk(by_bt_ray, {"strategy": strategy}, optimizers=dspys_own, optimizer_compile_args=OWN_ARGUMENTS)
    assert len(ours.candidates) == 1 + len(strategy.split(" -> "))
    assert ours.candidates == theirs.candidates
    assert ours.seen == theirs.seen
    assert ours.generations == theirs.generations
    assert not ours.program.flag_compilation_error_occurred


@pytest.mark.parametrize("arguments", [{"valset_ratio": 0.3}, {"valset_ratio": 0}], ids=str)
def test_the_validation_modes_are_the_same(walk: Callable[..., Walk], arguments: dict[str, Any]) -> None:
    arguments = {"strategy": "w -> p", **arguments}
    theirs = walk(by_dspy, arguments, optimizers=only_p_and_w, valset=None)
    ours = walk(by_bt_ray, arguments, optimizers=only_p_and_w, valset=None)
    assert ours.candidates == theirs.candidates
    assert ours.seen == theirs.seen
    assert ours.generations == theirs.generations


def test_after_w_the_weights_of_w_answer(walk: Callable[..., Walk]) -> None:
    ours = walk(by_bt_ray, {"strategy": "p -> w -> p"}, optimizers=only_p_and_w)
    # 20 valset questions for each candidate: the base model for the baseline and p, the fine-tune from then on.
    assert [generation for generation, _, _ in ours.generations] == [0] * 40 + [1] * 40
    assert [demos for _, _, demos in ours.generations] == [0] * 20 + [2] * 60


def sorted_by_length(program: dspy.Module) -> list[dict[str, Any]]:
    return sorted(program.candidate_programs, key=lambda candidate: len(candidate["strategy"]))
