"""The identity of one immutable version of a model.

A base model's id is derived from its content (a folder) or its name (a model of the hub); a fine-tune's is random. No id
is ever used for two contents, so a cache keyed by it never mixes two versions.
"""

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from bt_ray.errors import ConfigError

MANIFEST = "bt_ray_weights.json"
SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Weights:
    """One version of a model.

    Attributes:
        id: Names the content; the `model` of requests.
        path: The folder to load it from, or a model id of the hub.
        parent: The id of the weights that were fine-tuned into these, None for a base model.
    """

    id: str
    path: str
    parent: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)


def base_weights(model: str) -> Weights:
    """The weights of a base model: a folder with a checkpoint, or a model id of the hub.

    Raises:
        ConfigError: `model` is a path and no checkpoint is there.
    """
    folder = Path(model)
    if not folder.is_absolute():
        return Weights(id=model.replace("/", "--"), path=model)
    if not folder.is_dir():
        raise ConfigError(f"model: the folder {model} does not exist.")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: {model} holds no config.json, so it is no checkpoint of transformers.")
    return Weights(id=f"{folder.name}-{content_digest(folder)}", path=model)


def content_digest(folder: Path) -> str:
    """12 hex digits over the files of a checkpoint: names, sizes and evenly spaced samples of each, wherever it lies.

    Files up to 4 MiB are read whole; of larger ones 64 samples of 64 KiB, enough to tell any two fine-tunes apart, which
    differ in every layer, at a cost that does not grow with the model.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            for sample in range(SAMPLES_PER_FILE):
                opened.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES_PER_FILE - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def new_weights_id(parent: Weights) -> str:
    """A fresh id for a fine-tune of `parent`: its base's name and 12 random hex digits."""
    base = parent.id.split("-ft-")[0]
    return f"{base}-ft-{secrets.token_hex(6)}"


def read_manifest(folder: Path) -> Weights:
    """The weights that a finished fine-tune left in `folder`. The manifest is written last: without it nothing is there.

    Raises:
        FileNotFoundError: The fine-tune did not finish.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    return Weights(id=manifest["id"], path=str(folder), parent=manifest["parent"])
