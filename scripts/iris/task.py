"""The Iris task of the BetterTogether paper: four measurements of a flower in, its species out.

From Soylu, Potts and Khattab, "Fine-Tuning and Prompt Optimization: Two Great Steps that Work Better Together",
https://arxiv.org/abs/2407.10930. The data are scikit-learn's.
"""

import random

import dspy
from dspy.teleprompt import BootstrapFewShotWithRandomSearch, BootstrapFinetune
from sklearn.datasets import load_iris

import bt_ray


class ClassifyIris(dspy.Signature):
    """Given the petal and sepal dimensions in cm, predict the iris species."""

    petal_length: str = dspy.InputField()
    petal_width: str = dspy.InputField()
    sepal_length: str = dspy.InputField()
    sepal_width: str = dspy.InputField()
    answer: str = dspy.OutputField(desc="setosa, versicolor, or virginica")


def exact_match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return bool(example.answer == prediction.answer)


def examples() -> list[dspy.Example]:
    """All 150 flowers in a fixed random order."""
    iris = load_iris()
    flowers = [
        dspy.Example(
            petal_length=str(petal_length),
            petal_width=str(petal_width),
            sepal_length=str(sepal_length),
            sepal_width=str(sepal_width),
            answer=str(iris.target_names[species]),
        ).with_inputs("petal_length", "petal_width", "sepal_length", "sepal_width")
        for (sepal_length, sepal_width, petal_length, petal_width), species in zip(iris.data, iris.target, strict=True)
    ]
    random.Random(0).shuffle(flowers)
    return flowers


def build() -> bt_ray.Task:
    flowers = examples()
    trainset, valset, testset = flowers[:50], flowers[50:100], flowers[100:]
    program = dspy.Predict(ClassifyIris)
    return bt_ray.Task(
        program=program,
        trainset=trainset,
        valset=valset,
        testset=testset,
        metric=exact_match,
        optimizers=lambda ctx: {
            "p": BootstrapFewShotWithRandomSearch(
                metric=exact_match,
                max_bootstrapped_demos=1,
                max_labeled_demos=2,
                num_candidate_programs=1,
                max_errors=1000,
            ),
            "w": BootstrapFinetune(metric=exact_match),
        },
        # The 135M model gets no training example right by itself, so the labels teach it.
        optimizer_compile_args={"w": {"teacher": bt_ray.gold_label_teacher(program, trainset)}},
    )
