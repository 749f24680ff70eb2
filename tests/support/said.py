"""A task that a tiny model can learn: whatever it is asked, the answer is "so"."""

import dspy
from dspy.teleprompt import BootstrapFinetune

import bt_ray


def same(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return bool(example.a == prediction.a)


def build() -> bt_ray.Task:
    program = dspy.Predict(dspy.Signature("q -> a", "Say it."))
    examples = [dspy.Example(q=f"{number}?", a="so").with_inputs("q") for number in range(32)]
    return bt_ray.Task(
        program=program,
        trainset=examples[:16],
        valset=examples[16:],
        metric=same,
        optimizers=lambda ctx: {"w": BootstrapFinetune(metric=same)},
        optimizer_compile_args={"w": {"teacher": bt_ray.gold_label_teacher(program, examples[:16])}},
    )
