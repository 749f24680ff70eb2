"""Tasks for scripted models: doubling numbers. See `scripted_server` for which questions a model answers right."""

import os
from pathlib import Path
from typing import Any

import dspy
import psutil
from dspy.teleprompt import GEPA, BootstrapFinetune, LabeledFewShot
from dspy.teleprompt.teleprompt import Teleprompter

import bt_ray
from bt_ray.errors import InfrastructureFailure


class Double(dspy.Signature):
    """Double the number."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


def examples(numbers: range) -> list[dspy.Example]:
    return [dspy.Example(question=f"number {n}", answer=str(2 * n)).with_inputs("question") for n in numbers]


def exact(example: dspy.Example, prediction: Any, trace: Any = None, *of_gepa: Any, **named: Any) -> bool:
    return bool(example.answer == prediction.answer)


def explained(example: dspy.Example, prediction: Any, trace: Any = None, *of_gepa: Any) -> dspy.Prediction:
    """A metric that says why, as GEPA wants it."""
    right = exact(example, prediction)
    return dspy.Prediction(score=float(right), feedback="Right." if right else f"It is {example.answer}, not a word.")


class Demos(Teleprompter):  # type: ignore[misc]
    """A prompt optimizer with a known outcome: the first `k` training examples, as they were shuffled, become demos."""

    def __init__(self, k: int = 2) -> None:
        self.k = k
        self.lm_when_built = dspy.settings.lm

    def compile(self, student: dspy.Module, *, trainset: list[dspy.Example], teacher: Any = None) -> dspy.Module:
        return LabeledFewShot(k=self.k).compile(student, trainset=trainset, sample=False)


class Failing(Teleprompter):  # type: ignore[misc]
    def compile(self, student: dspy.Module, *, trainset: list[dspy.Example]) -> dspy.Module:
        raise RuntimeError("this optimizer rejects everything")


def double(**replaced: Any) -> bt_ray.Task:
    program = dspy.Predict(Double)
    trainset = examples(range(100, 120))
    settings: dict[str, Any] = {
        "program": program,
        "trainset": trainset,
        "valset": examples(range(20)),
        "testset": examples(range(50, 70)),
        "metric": exact,
        "optimizers": lambda ctx: {"p": Demos(), "w": BootstrapFinetune(metric=exact), "bad": Failing()},
        "optimizer_compile_args": {"w": {"teacher": bt_ray.gold_label_teacher(program, trainset)}},
    }
    return bt_ray.Task(**{**settings, **replaced})


def hard_to_please() -> bt_ray.Task:
    """A metric that accepts nothing: nothing is left to train on."""

    def nothing(example: Any, prediction: Any, trace: Any = None) -> bool:
        return False

    return double(metric=nothing, optimizers=lambda ctx: {"w": BootstrapFinetune(metric=nothing)}, testset=None)


def broken_metric() -> bt_ray.Task:
    def broken(example: Any, prediction: Any, trace: Any = None) -> bool:
        raise KeyError("no such field")

    return double(metric=broken)


def note(step: str) -> None:
    """Add a line to the file beside this one. Each test that counts has a copy of this file of its own."""
    with Path(__file__).with_name("computed.txt").open("a") as log:
        log.write(f"{step}\n")


class Counted(Demos):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def compile(self, student: dspy.Module, *, trainset: list[dspy.Example], teacher: Any = None) -> dspy.Module:
        note(self.prefix)
        return super().compile(student, trainset=trainset)


class CountedFinetune(BootstrapFinetune):  # type: ignore[misc]
    def __init__(self, prefix: str) -> None:
        super().__init__(metric=exact)
        self.prefix = prefix

    def compile(self, student: dspy.Module, trainset: list[dspy.Example], teacher: Any = None) -> dspy.Module:
        note(self.prefix)
        return super().compile(student, trainset=trainset, teacher=teacher)


def counted() -> bt_ray.Task:
    """Each run of an optimizer, and of the baseline's evaluation, is noted."""

    def counting(example: Any, prediction: Any, trace: Any = None) -> bool:
        if example.question == "number 0" and str(dspy.settings.get("bt_ray_step")).startswith("baseline,"):
            note("baseline")
        return exact(example, prediction)

    def optimizers(ctx: bt_ray.StepContext) -> dict[str, Teleprompter]:
        return {"p": Counted(ctx.prefix), "w": CountedFinetune(ctx.prefix)}

    return double(metric=counting, testset=None, optimizers=optimizers)


def reflected() -> bt_ray.Task:
    """GEPA with a budget of 80 calls of its metric, each of which is noted. Its process dies once, at the 50th."""
    noted = Path(__file__).with_name("computed.txt")

    def dying(example: Any, prediction: Any, trace: Any = None, *of_gepa: Any) -> bool:
        note("metric")
        if len(noted.read_text().splitlines()) == 50:
            os._exit(1)
        return exact(example, prediction)

    def propose(candidate: dict[str, str], reflective_dataset: Any, components_to_update: list[str]) -> dict[str, str]:
        return {name: f"{candidate[name]} Be quick." for name in components_to_update}

    def optimizers(ctx: bt_ray.StepContext) -> dict[str, Teleprompter]:
        settings = {"max_metric_calls": 80, "num_threads": 1, "seed": 0, "reflection_minibatch_size": 3}
        return {"g": GEPA(metric=dying, instruction_proposer=propose, log_dir=str(ctx.scratch_dir), **settings)}

    return double(optimizers=optimizers, optimizer_compile_args={}, testset=None)


def judged() -> bt_ray.Task:
    """A metric that would let the student judge itself, if that were what it is asked to do."""

    def by_somebody_else(example: Any, prediction: Any, trace: Any = None) -> bool:
        return dspy.settings.lm is None and exact(example, prediction)

    return double(metric=by_somebody_else)


def deadly() -> bt_ray.Task:
    """A metric that takes its process with it."""

    def end(example: Any, prediction: Any, trace: Any = None) -> bool:
        os._exit(1)

    return double(metric=end)


def deadly_elsewhere(first: int) -> bt_ray.Task:
    """A metric that takes its process with it, once, where that is not the trial's own, at a question from `first` on."""

    def end(example: Any, prediction: Any, trace: Any = None) -> bool:
        if int(example.question.split()[1]) >= first and in_another_process():
            died = Path(__file__).with_name("computed.txt")
            if not died.exists():
                died.touch()
                os._exit(1)
        return exact(example, prediction)

    return double(metric=end)


def broken_elsewhere() -> bt_ray.Task:
    """A metric without a value, where its process is not the trial's own: `dspy.Evaluate` cannot add it up."""

    def nothing(example: Any, prediction: Any, trace: Any = None) -> bool | None:
        return None if in_another_process() else exact(example, prediction)

    return double(metric=nothing)


def in_another_process() -> bool:
    return psutil.Process().cmdline()[0].startswith("ray::EvaluatingProcess")


def large(valset: int) -> bt_ray.Task:
    """A valset of so many examples."""
    return double(valset=examples(range(valset)), testset=None)


def without_testset() -> bt_ray.Task:
    return double(testset=None)


def without_valset() -> bt_ray.Task:
    return double(valset=None)


class NoTest(dspy.Module):  # type: ignore[misc]
    """Answers everything but the testset, on which the infrastructure is lost."""

    def __init__(self) -> None:
        self.predict = dspy.Predict(Double)

    def forward(self, question: str) -> Any:
        if question == "number 50":
            raise InfrastructureFailure("no test today")
        return self.predict(question=question)


def failing_test() -> bt_ray.Task:
    return double(program=NoTest(), optimizer_compile_args={})
