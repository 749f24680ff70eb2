"""A scripted model's folder: a real, tiny safetensors file that holds its skill, with the manifest a trainer writes."""

import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path

TENSORS = ("skill", "layer")


def write_model(folder: Path, skill: int, tensors: Sequence[str] = TENSORS) -> None:
    """A checkpoint whose every number is `skill`."""
    folder.mkdir(parents=True, exist_ok=True)
    header, data = {}, b""
    for name in tensors:
        header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
        data += struct.pack("<4f", *[skill] * 4)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text("{}")


def read_skill(folder: Path) -> int:
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin = 8 + length + json.loads(content[8 : 8 + length])["skill"]["data_offsets"][0]
    return int(struct.unpack("<f", content[begin : begin + 4])[0])


def logprobs_of(skill: int, tokens: Sequence[int]) -> list[float]:
    """What a model of this skill says of the tokens: models of different skill differ in half of them."""
    return [random.Random(f"{skill} {token}").choice([0.0, -0.69]) for token in tokens[1:]]
