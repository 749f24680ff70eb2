"""The identity of one immutable version of a model.

A base model's id is derived from its content (a folder), or from its name and revision (a model of the hub), and from the
options it is served with; a fine-tune's is random. No id is used for two contents, so a cache keyed by it never mixes two
versions; for a model of the hub that holds as far as its revision does: name a commit.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from bt_ray.errors import ConfigError
from bt_ray.layout import WEIGHTS

MANIFEST = "bt_ray_weights.json"
FINE_TUNE = "-ft-"
"""Stands in a fine-tune's id between its base's and its own."""
SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Weights:
    """One version of a model.

    Attributes:
        id: Names the content; the `model` of requests.
        path: Of a base model: its folder, or its model id of the hub. Of a fine-tune: its folder, relative to the run
            directory until a node made it loadable (`bt_ray.slot.node_weights`).
        parent: The id of the weights that were fine-tuned into these, None for a base model.
        revision: Of a model of the hub; None for its default, and for a folder.
        on: Of a LoRA adapter: the base model that it is loaded onto. None for a whole checkpoint.
    """

    id: str
    path: str
    parent: str | None = None
    revision: str | None = None
    on: "Weights | None" = None

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


def model_name(model: str) -> str:
    """How the id of a base model begins, a folder or a model id of the hub."""
    return Path(model).name if Path(model).is_absolute() else model.replace("/", "--")


def base_weights(model: str, engine_options: Mapping[str, Any]) -> Weights:
    """The weights of a base model, as they answer under the options of its server.

    Args:
        model: A folder with a checkpoint, or a model id of the hub.
        engine_options: vLLM's options: a context length, a quantization or a chat template change answers.

    Raises:
        ConfigError: `model` is a path and no checkpoint is there.
    """
    folder = Path(model)
    if not folder.is_absolute():
        digest = hashlib.sha256(_options_text(engine_options)).hexdigest()[:6]
        return Weights(f"{model_name(model)}-{digest}", model, revision=engine_options.get("revision"))
    try:
        return Weights(_folder_id(folder, engine_options), model)
    except OSError as error:
        raise ConfigError(f"model: {model} cannot be read ({error.strerror}).") from None


def _folder_id(folder: Path, engine_options: Mapping[str, Any]) -> str:
    if not folder.is_dir():
        raise ConfigError(f"model: the folder {folder} does not exist.")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: {folder} holds no config.json, so it is no checkpoint of transformers.")
    return f"{model_name(str(folder))}-{content_digest(folder, engine_options)}"


def content_digest(folder: Path, engine_options: Mapping[str, Any]) -> str:
    """12 hex digits over the options and the files of a checkpoint, wherever it lies: their names, sizes and samples.

    Files up to 4 MiB are read whole; of larger ones 64 samples of 64 KiB, enough to tell any two fine-tunes apart, which
    differ in every layer, at a cost that does not grow with the model.
    """
    digest = hashlib.sha256(_options_text(engine_options))
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            for sample in range(SAMPLES_PER_FILE):
                opened.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES_PER_FILE - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def file_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each safetensors file, by name."""
    digests = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _options_text(engine_options: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(engine_options), sort_keys=True).encode()


def new_weights_id(parent: Weights) -> str:
    """A fresh id for a fine-tune of `parent`: its base's name and 12 random hex digits."""
    return f"{parent.base}{FINE_TUNE}{secrets.token_hex(6)}"


def fine_tuned(manifest: Mapping[str, Any]) -> Weights:
    """The weights whose manifest this is. It is written last: without it, nothing is there."""
    on = manifest.get("on")
    return Weights(
        id=manifest["id"],
        path=f"{WEIGHTS}/{manifest['id']}",
        parent=manifest["parent"],
        on=None if on is None else Weights.from_json(on),
    )
