"""`dspy.BetterTogether` itself, as the reference: fresh optimizers for each step, in the context of the student's LM."""

from pathlib import Path
from typing import Any

import dspy

from bt_ray.task.task import StepContext, Task, step_seed
from bt_ray.trial.lm import ServedLM


class Reference(dspy.BetterTogether):  # type: ignore[misc]
    """`dspy.BetterTogether` whose optimizers are built anew for each step.

    Args:
        task: What to optimize; its program's predictors have LMs.
        lm: The LM to build the first optimizers with.
        seed: The sweep's seed.
    """

    def __init__(self, task: Task, lm: dspy.LM, seed: int) -> None:
        self.task = task
        self.seed = seed
        with dspy.context(lm=lm):
            super().__init__(metric=task.metric, **self.built("", lm))

    def built(self, prefix: str, lm: dspy.LM) -> Any:
        assert self.task.optimizers is not None
        return self.task.optimizers(StepContext(prefix, step_seed(self.seed, prefix), Path("unused"), lm))

    def _run_and_evaluate_step(self, optimizer: Any, student: Any, *args: Any) -> Any:
        prefix = args[5]
        lm = student.predictors()[0].lm
        with dspy.context(lm=lm):
            return super()._run_and_evaluate_step(self.built(prefix, lm)[prefix.split(" -> ")[-1]], student, *args)


def reference_run(
    task: Task, lm: ServedLM, seed: int, reference: type[Reference] = Reference, **arguments: Any
) -> dspy.Module:
    """The program that one strategy of `task` gives by itself, with DSPy's `candidate_programs`."""
    return reference(task, lm, seed).compile(
        task.program,
        trainset=list(task.trainset),
        valset=list(task.valset) if task.valset else None,
        seed=seed,
        optimizer_compile_args={key: dict(value) for key, value in task.optimizer_compile_args.items()},
        **arguments,
    )
