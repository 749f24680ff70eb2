"""The validation examples that a report shows: what is kept of them, and where."""

from dataclasses import replace

import dspy
import pytest

from bt_ray.layout import EXAMPLES
from bt_ray.run_dir.examples import KeptExample, examples_file, keep_examples, read_examples
from bt_ray.run_dir.storage import Storage
from bt_ray.step import StepKey

FILE = f"{EXAMPLES}/some.json"
BASELINE = StepKey("", "k", "", {"trainset": "t", "valset": "v", "evaluation": "e", "seed": "s"}, False)


class Shy:
    def __str__(self) -> str:
        raise RuntimeError("not me")


def kept(storage: Storage, *examples: dspy.Example) -> tuple[KeptExample, ...]:
    keep_examples(storage, FILE, examples)
    return read_examples(storage, FILE)


def test_inputs_and_labels_are_kept_apart_and_dspys_own_fields_are_not(storage: Storage) -> None:
    example = dspy.Example(question="Why?", hint="", answer="So.", dspy_uuid="1").with_inputs("question", "hint", "absent")
    assert kept(storage, example) == (KeptExample({"question": "Why?", "hint": ""}, {"answer": "So."}),)


def test_any_value_is_kept_as_a_text_of_bounded_length(storage: Storage) -> None:
    fields = {"set": {1}, "none": None, "shy": Shy(), "half": "\ud800", "long": "x" * 301, "fits": "x" * 300}
    (found,) = kept(storage, dspy.Example(fields).with_inputs(*fields))
    assert found.inputs == {
        "set": "{1}",
        "none": "None",
        "shy": "a Shy, which cannot be shown: RuntimeError",
        "half": "\ud800",
        "long": "x" * 299 + "…",
        "fits": "x" * 300,
    }


def test_of_many_examples_and_of_many_fields_the_first_are_kept(storage: Storage) -> None:
    wide = dspy.Example({str(number): number for number in range(1000)})
    found = kept(storage, *[wide.with_inputs(*map(str, range(500)))] * 501)
    assert len(found) == 500
    assert list(found[-1].inputs) == [str(number) for number in range(20)]
    assert list(found[-1].labels) == [str(number) for number in range(500, 520)]


@pytest.mark.parametrize("content", [b"", b"[1]", b'[{"inputs": {}}]', b"3", b'{"a": 1}'])
def test_what_is_no_such_file_is_none(storage: Storage, content: bytes) -> None:
    assert read_examples(storage, FILE) == ()
    storage.write(FILE, content)
    assert read_examples(storage, FILE) == ()


def test_baselines_on_the_same_examples_share_a_file() -> None:
    assert examples_file(BASELINE) == examples_file(
        replace(BASELINE, key="other", parts={**BASELINE.parts, "seed": "other"})
    )
    assert examples_file(BASELINE) != examples_file(replace(BASELINE, parts={**BASELINE.parts, "valset": "other"}))
