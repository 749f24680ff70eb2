"""The Iris task of the BetterTogether paper: four measurements of a flower in, its species out.

From Soylu, Potts and Khattab, "Fine-Tuning and Prompt Optimization: Two Great Steps that Work Better Together",
https://arxiv.org/abs/2407.10930. The flowers in `iris.csv` are Fisher's, "The Use of Multiple Measurements in Taxonomic
Problems", 1936.
"""

import csv
import random
from pathlib import Path

import dspy
from dspy.teleprompt import BootstrapFewShotWithRandomSearch, BootstrapFinetune

import bt_ray

FLOWERS = Path(__file__).with_name("iris.csv")


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
    with FLOWERS.open(newline="") as file:
        flowers = [dspy.Example(**row).with_inputs(*ClassifyIris.input_fields) for row in csv.DictReader(file)]
    random.Random(0).shuffle(flowers)
    return flowers


def build() -> bt_ray.Task:
    # DSPy asks a second time, for JSON, where an answer does not parse: this model's do not parse then either.
    dspy.configure(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
    flowers = examples()
    trainset, valset, testset = flowers[:70], flowers[70:100], flowers[100:]
    program = dspy.Predict(ClassifyIris)
    # The 135M model gets no training example right by itself, so the labels teach it.
    teacher = bt_ray.gold_label_teacher(program, trainset)
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
                num_candidate_programs=0,  # no demos, labelled ones, and a bootstrapped one
                max_errors=1000,
            ),
            "w": BootstrapFinetune(metric=exact_match),
        },
        optimizer_compile_args={"p": {"teacher": teacher}, "w": {"teacher": teacher}},
    )
