"""A step's key: what stands for all that a step depends on."""

from dataclasses import asdict, dataclass, field
from typing import Any

KIND = 2
"""Of the keys that this version makes. Keys of different kinds say nothing about each other."""


@dataclass(frozen=True)
class StepKey:
    """A step's key, and what it is made of.

    Attributes:
        prefix: The step.
        key: Hash of the parent's key and of `parts`.
        parent: The parent's key; `""` for the baseline.
        parts: A hash for each thing that the step adds to what its parent depends on, by its name.
        trains: Whether it fine-tunes.
        reached: A hash for each function, class, value, file, package and setting in the parts that its parent does not
            have just so, by what a user calls it.
        kind: `KIND` of the version that made it; 1 where a version wrote none.
        valset: A hash of the examples that its program is scored on; `""` without validation, or where a version wrote none.
            No part of the key, whose parts have it.
    """

    prefix: str
    key: str
    parent: str
    parts: dict[str, str]
    trains: bool
    reached: dict[str, str] = field(default_factory=dict)
    kind: int = 1
    valset: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
