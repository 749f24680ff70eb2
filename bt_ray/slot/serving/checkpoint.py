"""The layout of a checkpoint, from its files' headers, without reading the tensors.

vLLM's engine is dead after a failed reload, and a checkpoint that lacks a layer reloads without an error: so the headers are
compared first. The format: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bt_ray.errors import StorageError
from bt_ray.weights import Weights

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""The tensors of a checkpoint by name: data type and shape."""
LONGEST_HEADER = 100_000_000
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
TIED = "lm_head.weight"


def read_layout(folder: Path) -> Layout:
    """The tensors of all safetensors files of a checkpoint.

    Raises:
        StorageError: A file is cut off or damaged, or there is none.
    """
    layout: Layout = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _header(file).items():
            if name != "__metadata__":
                layout[name] = (tensor["dtype"], tuple(tensor["shape"]))
    if not layout:
        raise StorageError(f"{folder} holds no safetensors.")
    if _ties_embeddings(folder):
        layout.pop(TIED, None)  # some write it all the same
    return layout


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= LONGEST_HEADER:
                raise ValueError("its header's length is impossible")
            header: dict[str, Any] = json.loads(opened.read(length))
        ends = [_end(name, tensor) for name, tensor in header.items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
        if (size := file.stat().st_size) != wanted:
            raise ValueError(f"it has {size} bytes, and should have {wanted}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{file} is damaged: {error}.") from error
    return header


def _end(name: str, tensor: Mapping[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    size = SIZES.get(tensor["dtype"])
    if size is not None and end - begin != size * math.prod(tensor["shape"]):
        raise ValueError(f"tensor {name} has {end - begin} bytes, which does not fit its shape")
    return int(end)


def _ties_embeddings(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError):
        return False


def layout_difference(ours: Layout, theirs: Layout) -> str | None:
    """What keeps a checkpoint from being loaded in place of another, None if nothing does."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours:
            return f"tensor {name} is missing"
        if name not in theirs:
            return f"tensor {name} is unknown to the model"
        if ours[name] != theirs[name]:
            return f"tensor {name} is {ours[name]}, and should be {theirs[name]}"
    return None


def checkpoint_folder(weights: Weights) -> Path | None:
    """Where the files of loadable weights are on this machine; None for a model of the hub that is not here yet."""
    if (folder := Path(weights.path)).is_absolute():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(weights.path, revision=weights.revision, local_files_only=True))
    except Exception:  # it is not installed, or has no copy: then there is nothing to compare with
        return None
