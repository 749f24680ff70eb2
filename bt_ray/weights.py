"""The identity of one immutable version of a model.

A base model's id is derived from its content (a folder), or from its name and commit (a model of the hub), and from the
options that it is served with; a fine-tune's is random. No id is used for two contents, so a cache keyed by it never mixes
two versions.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from bt_ray.errors import StorageError
from bt_ray.layout import WEIGHTS

MANIFEST = "bt_ray_weights.json"
FINE_TUNE = "-ft-"
"""Stands in a fine-tune's id between its base's and its own."""


@dataclass(frozen=True)
class Weights:
    """One version of a model.

    Attributes:
        id: Names the content; the `model` of requests.
        path: Of a base model: its folder, or its model id of the hub. Of a fine-tune: its folder, relative to the run
            directory until a node made it loadable (`bt_ray.slot.node_weights`).
        parent: The id of the weights that were fine-tuned into these, None for a base model.
        revision: The commit of a model of the hub; None for a folder.
        on: Of a LoRA adapter: the base model that it is loaded onto. None for a whole checkpoint.
        origin: Of a fine-tune: the location of the run directory that it lies in, if that is another than the sweep's own.
    """

    id: str
    path: str
    parent: str | None = None
    revision: str | None = None
    on: "Weights | None" = None
    origin: str | None = None

    @property
    def base(self) -> str:
        """The id of the base model that they come from: equal bases, equal architectures."""
        return self.id if self.parent is None else self.id.rpartition(FINE_TUNE)[0]

    @property
    def model(self) -> str:
        """The base model as its id begins: `model_name` of what the settings call it."""
        return self.base.rpartition("-")[0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        on = values.get("on")
        return cls(**{**values, "on": None if on is None else cls.from_json(on)})


def find_hub_models(bases: Iterable[Weights]) -> dict[str, Weights]:
    """Those of the base models that come from the hub, by the name that settings call them by."""
    return {weights.path: weights for weights in bases if weights.revision is not None}


def model_name(model: str) -> str:
    """How the id of a base model begins, a folder or a model id of the hub."""
    return Path(model).name if Path(model).is_absolute() else model.replace("/", "--")


def new_weights_id(parent: Weights) -> str:
    """A fresh id for a fine-tune of `parent`: its base's name and 12 random hex digits."""
    return f"{parent.base}{FINE_TUNE}{secrets.token_hex(6)}"


def weights_gone(path: str, location: str, origin: str | None = None) -> StorageError:
    """The error for weights that are no longer in their run directory, or in that which `location` refers to for them."""
    if origin is None:
        return StorageError(f"The weights {path} in {location} are gone.")
    return StorageError(f"The weights {path} in {origin} are gone, to which {location} refers (reuse_weights).")


def fine_tuned(manifest: Mapping[str, Any]) -> Weights:
    """The weights whose manifest this is. It is written last: without it, nothing is there."""
    on = manifest.get("on")
    return Weights(
        id=manifest["id"],
        path=f"{WEIGHTS}/{manifest['id']}",
        parent=manifest["parent"],
        on=None if on is None else Weights.from_json(on),
        origin=manifest.get("origin"),
    )
