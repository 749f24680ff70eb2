"""The gold-label teacher answers with the labels, or refuses."""

from typing import Any

import dspy
import pytest
from dspy.teleprompt import BootstrapFewShot
from support import tasks

from bt_ray.errors import TaskError
from bt_ray.task.teachers import gold_label_teacher, stand_in_for

EXAMPLES = tasks.examples(range(5))


class Wrapped(dspy.Module):  # type: ignore[misc]
    def __init__(self, signature: Any = tasks.Double) -> None:
        self.inner = [dspy.Predict(signature)]

    def forward(self, question: str) -> Any:
        return self.inner[0](question=question)


@pytest.mark.parametrize("program", [dspy.Predict(tasks.Double), Wrapped()], ids=["predict", "module"])
def test_it_answers_every_example_with_its_label_and_leaves_a_trace(program: dspy.Module) -> None:
    teacher = gold_label_teacher(program, EXAMPLES)
    assert [name for name, _ in teacher.named_predictors()] == [name for name, _ in program.named_predictors()]
    with dspy.context(trace=[]):
        assert [teacher(**example.inputs()).answer for example in EXAMPLES] == [example.answer for example in EXAMPLES]
        traced = [(inputs["question"], prediction.answer) for _, inputs, prediction in dspy.settings.trace]
    assert traced == [(example.question, example.answer) for example in EXAMPLES]


def test_it_makes_demos_of_the_labels() -> None:
    program = Wrapped()
    teacher = gold_label_teacher(program, EXAMPLES)
    optimizer = BootstrapFewShot(metric=tasks.exact, max_bootstrapped_demos=3, max_labeled_demos=0)
    compiled = optimizer.compile(program, teacher=teacher, trainset=EXAMPLES)
    assert [(demo["question"], demo["answer"]) for demo in compiled.predictors()[0].demos] == [
        (example.question, example.answer) for example in EXAMPLES[:3]
    ]


def test_optimizers_give_it_no_demos() -> None:
    teacher = gold_label_teacher(dspy.Predict(tasks.Double), EXAMPLES)
    optimizer = BootstrapFewShot(metric=tasks.exact, max_bootstrapped_demos=1, max_labeled_demos=2)
    optimizer.compile(dspy.Predict(tasks.Double), teacher=teacher, trainset=EXAMPLES)
    assert optimizer.teacher.predictors()[0].demos == []


def test_it_takes_over_the_students_prompt_so_that_training_prompts_are_those_that_will_be_asked() -> None:
    student, teacher = Wrapped(tasks.Double.with_instructions("Twice, please.")), gold_label_teacher(Wrapped(), EXAMPLES)
    student.predictors()[0].demos = [dict(EXAMPLES[0])]
    stand_in_for(student, [teacher])
    assert teacher.predictors()[0].demos == [dict(EXAMPLES[0])]
    assert teacher.predictors()[0].signature.instructions == "Twice, please."
    other = Wrapped()
    stand_in_for(student, other)
    stand_in_for(student, None)
    assert other.predictors()[0].demos == [], "another teacher's demos are its own"
    assert other.predictors()[0].signature.instructions == "Double the number."


def test_programs_that_it_cannot_label_are_refused() -> None:
    class Two(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.first, self.second = dspy.Predict(tasks.Double), dspy.Predict(tasks.Double)

    with pytest.raises(TaskError, match=r"one predictor; this one has 2: first, second\."):
        gold_label_teacher(Two(), EXAMPLES)
    with pytest.raises(TaskError, match="example 0 has no reasoning"):
        gold_label_teacher(dspy.ChainOfThought(tasks.Double), EXAMPLES)


def test_a_question_without_a_label_is_an_error() -> None:
    with pytest.raises(TaskError, match="no label for"):
        gold_label_teacher(dspy.Predict(tasks.Double), EXAMPLES)(question="number 99")
