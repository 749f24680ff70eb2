"""The validation examples as texts, kept in the run directory for a report, which loads no task.

Baselines that are evaluated on the same examples share a file below `examples/`, named by a hash of what the baseline's key
says of the data. It is no part of any key: without it, a report has the numbers of the examples alone.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from bt_ray.layout import EXAMPLES
from bt_ray.run_dir.storage import Storage
from bt_ray.step import StepKey

if TYPE_CHECKING:
    import dspy

MOST_EXAMPLES, MOST_FIELDS, MOST_CHARACTERS = 500, 20, 300
"""How much is kept: of a valset, of an example's inputs and of its labels, and of a field's text."""


@dataclass(frozen=True)
class KeptExample:
    """The texts of an example's fields, by name."""

    inputs: dict[str, str]
    labels: dict[str, str]


def examples_file(baseline: StepKey) -> str:
    """Where the examples are kept on which a baseline, and each step from there, is evaluated."""
    return f"{EXAMPLES}/{_digest_of_examples(baseline)}.json"


def _digest_of_examples(baseline: StepKey) -> str:
    parts = [baseline.parts.get(name, "") for name in ("trainset", "valset", "evaluation")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def keep_examples(storage: Storage, file: str, valset: "Sequence[dspy.Example]") -> None:
    """Keep the first examples of a valset, as far as a page can show them."""
    storage.write_json(file, [asdict(_make_kept_example(example)) for example in valset[:MOST_EXAMPLES]])


def read_examples(storage: Storage, file: str) -> tuple[KeptExample, ...]:
    """What was kept of a valset, in order; nothing where a sweep kept none."""
    try:
        return tuple(KeptExample(**values) for values in storage.read_json(file) or ())
    except TypeError:
        return ()


def _make_kept_example(example: "dspy.Example") -> KeptExample:
    fields = example.items()
    inputs = ((name, value) for name, value in fields if name in example._input_keys)
    labels = ((name, value) for name, value in fields if name not in example._input_keys)
    return KeptExample(_texts(inputs), _texts(labels))


def _texts(fields: Iterable[tuple[str, Any]]) -> dict[str, str]:
    return {name: _text(value) for name, value in islice(fields, MOST_FIELDS)}


def _text(value: Any) -> str:
    """`str(value)`, cut; whatever a value of the user's does with that."""
    try:
        text = str(value)
    except Exception as error:
        return f"a {type(value).__name__}, which cannot be shown: {type(error).__name__}"
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
