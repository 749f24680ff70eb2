"""Teachers that need no stronger model."""

from collections.abc import Sequence
from typing import Any

import dspy

from bt_ray.errors import TaskError


def gold_label_teacher(program: dspy.Module, examples: Sequence[dspy.Example]) -> dspy.Module:
    """A copy of `program` that answers with the examples' own labels instead of asking a model.

    For a model that is too weak to bootstrap itself: `BootstrapFinetune` then trains on the labels, and
    `BootstrapFewShot` makes demos of them. It can only stand in for a program with one predictor whose inputs and
    outputs are fields of every example. In each step it takes over the student's instruction and demos (`stand_in_for`),
    so that the prompts trained on are those that the program will be asked with.

    Args:
        program: The student.
        examples: The labelled examples that it will be asked about: the trainset.

    Raises:
        TaskError: The program has several predictors, or an example lacks a field of its predictor.
    """
    named = program.named_predictors()
    if len(named) != 1:
        names = ", ".join(name for name, _ in named)
        raise TaskError(f"The gold-label teacher labels programs with one predictor; this one has {len(named)}: {names}.")
    name, predictor = named[0]
    fields = [*predictor.signature.input_fields, *predictor.signature.output_fields]
    for index, example in enumerate(examples):
        missing = [field for field in fields if field not in example]
        if missing:
            raise TaskError(
                f"The gold-label teacher cannot label predictor {name!r}: example {index} has no {', '.join(missing)}."
            )
    if isinstance(program, dspy.Predict):
        teacher: dspy.Module = LabelledPredict(program, examples)
    else:
        teacher = program.deepcopy()
        teacher.map_named_predictors(lambda copied: LabelledPredict(copied, examples))
    teacher._compiled = True  # optimizers must not give it demos: it uses no prompt
    return teacher


def stand_in_for(student: dspy.Module, teacher: Any) -> None:
    """Give the student's signature and demos to each gold-label teacher in `teacher`, a program or a list of them.

    `BootstrapFinetune` builds its training prompts with the teacher's instruction and demos and leaves the student its own:
    without this a program would be fine-tuned on prompts that it is not asked with. `BootstrapFewShot` refuses a teacher
    with another instruction than the student's.
    """
    for program in teacher if isinstance(teacher, list) else [teacher]:
        if isinstance(program, dspy.Module):
            for copied, own in zip(program.predictors(), student.predictors(), strict=True):
                if isinstance(copied, LabelledPredict):
                    copied.signature = own.signature
                    copied.demos = list(own.demos)


class LabelledPredict(dspy.Predict):  # type: ignore[misc]
    """A predictor that looks its answer up among labelled examples."""

    def __init__(self, predictor: dspy.Predict, examples: Sequence[dspy.Example]) -> None:
        super().__init__(predictor.signature)
        self.inputs = list(predictor.signature.input_fields)
        self.outputs = list(predictor.signature.output_fields)
        self.labels = {self._key(example): {key: example[key] for key in self.outputs} for example in reversed(examples)}

    def _key(self, values: Any) -> str:
        return repr([values[key] for key in self.inputs])

    def forward(self, **kwargs: Any) -> dspy.Prediction:
        label = self.labels.get(self._key(kwargs))
        if label is None:
            raise TaskError(f"The gold-label teacher has no label for {kwargs!r}.")
        prediction = dspy.Prediction.from_completions([label], signature=self.signature)
        if (trace := dspy.settings.trace) is not None:
            trace.append((self, dict(kwargs), prediction))
        return prediction
