"""What the headers of a checkpoint tell before it is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.scripted_model import write_model

from bt_ray.errors import StorageError
from bt_ray.slot.file_digest import digest_safetensors
from bt_ray.slot.serving.checkpoint import checkpoint_folder, layout_difference, read_layout
from bt_ray.weights import Weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "a", skill=2)
    return tmp_path / "a"


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def header_of_nothing(file: Path) -> None:
    file.write_bytes((1 << 40).to_bytes(8, "little"))


def no_json(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8] = ord("!")
    file.write_bytes(content)


def wrong_offsets(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"[0, 16]", b"[0, 12]"))


@pytest.mark.parametrize("damage", [truncated, longer, header_of_nothing, no_json, wrong_offsets, Path.unlink])
def test_a_damaged_checkpoint_is_told(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "model.safetensors")
    with pytest.raises(StorageError, match=r"is damaged|holds no safetensors"):
        read_layout(folder)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (("skill",), "layer is missing"),
        (("skill", "layer", "more"), "more is unknown"),
        (("skill", "layers"), "layer is missing"),
    ],
)
def test_other_tensors_are_told(folder: Path, tmp_path: Path, tensors: tuple[str, ...], told: str) -> None:
    write_model(tmp_path / "b", skill=2, tensors=tensors)
    assert told in (layout_difference(read_layout(tmp_path / "b"), read_layout(folder)) or "")


def test_other_shapes_and_types_are_told_and_other_numbers_are_not(folder: Path, tmp_path: Path) -> None:
    ours = read_layout(folder)
    assert "should be" in (layout_difference({**ours, "skill": ("F32", (2, 2))}, ours) or "")
    assert "should be" in (layout_difference({**ours, "skill": ("BF16", (4,))}, ours) or "")
    write_model(tmp_path / "b", skill=9)
    assert layout_difference(read_layout(tmp_path / "b"), ours) is None
    assert digest_safetensors(tmp_path / "b") != digest_safetensors(folder)


def test_a_tied_head_may_be_written_or_not(tmp_path: Path) -> None:
    for name, tensors in (("a", ("skill",)), ("b", ("skill", "lm_head.weight"))):
        write_model(tmp_path / name, skill=2, tensors=tensors)
        (tmp_path / name / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert layout_difference(read_layout(tmp_path / "b"), read_layout(tmp_path / "a")) is None


def test_a_model_of_the_hub_that_is_not_here_has_no_folder(tmp_path: Path) -> None:
    assert checkpoint_folder(Weights("x", "no-such/model")) is None
    assert checkpoint_folder(Weights("x", str(tmp_path))) == tmp_path
