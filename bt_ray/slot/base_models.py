"""Base models: a folder or a model of the hub as weights, whose id stands for the whole content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bt_ray.errors import ConfigError
from bt_ray.slot.file_digest import digest_files
from bt_ray.slot.hub import find_commit
from bt_ray.weights import Weights, model_name


def base_weights(model: str, engine_options: Mapping[str, Any]) -> Weights:
    """The weights of a base model, as they answer under the options of its server.

    Args:
        model: A folder with a checkpoint, or a model id of the hub.
        engine_options: vLLM's options: a context length, a quantization or a chat template change answers.

    Raises:
        ConfigError: `model` is a path and no checkpoint is there, or the commit of a model of the hub cannot be told.
    """
    folder = Path(model)
    if not folder.is_absolute():
        commit = find_commit(model, engine_options.get("revision"))
        options = {**engine_options, "revision": commit}
        return Weights(
            f"{model_name(model)}-{hashlib.sha256(_options_text(options)).hexdigest()[:12]}", model, revision=commit
        )
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
    """12 hex digits over the options and the files of a checkpoint, their names and whole content, wherever it lies."""
    digest = hashlib.sha256(_options_text(engine_options))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for file, content in zip(files, digest_files(files), strict=True):
        digest.update(f"{file.name}\0{content}\0".encode())
    return digest.hexdigest()[:12]


def _options_text(engine_options: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(engine_options), sort_keys=True).encode()
