"""The ids of weights: one for each content that answers."""

import os
from pathlib import Path

import pytest

from bt_ray.errors import ConfigError
from bt_ray.weights import SAMPLE_BYTES, SAMPLES_PER_FILE, Weights, base_weights, new_weights_id


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(2 * SAMPLES_PER_FILE * SAMPLE_BYTES))
    return folder


def test_equal_content_has_one_id_wherever_it_lies(checkpoint: Path, tmp_path: Path) -> None:
    first = base_weights(str(checkpoint), {})
    (tmp_path / "elsewhere").mkdir()
    elsewhere = checkpoint.rename(tmp_path / "elsewhere" / "model")
    assert base_weights(str(elsewhere), {}).id == first.id


def test_other_content_and_other_options_have_other_ids(checkpoint: Path) -> None:
    ids = {base_weights(str(checkpoint), {}).id, base_weights(str(checkpoint), {"max_model_len": 512}).id}
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    for layer in range(SAMPLES_PER_FILE):  # a fine-tune changes every layer
        content[2 * layer * SAMPLE_BYTES] ^= 1
        content[(2 * layer + 1) * SAMPLE_BYTES] ^= 1
    file.write_bytes(content)
    ids.add(base_weights(str(checkpoint), {}).id)
    ids |= {base_weights("org/model", {}).id, base_weights("org/model", {"revision": "abc"}).id}
    assert len(ids) == 5
    assert base_weights("org/model", {"revision": "abc"}).revision == "abc"


def test_a_fine_tune_is_never_given_an_id_twice() -> None:
    base = Weights("base", "/base")
    once = Weights(new_weights_id(base), "/once", base.id)
    assert len({base.id, once.id, new_weights_id(base), new_weights_id(once)}) == 4
    assert new_weights_id(once).startswith("base-ft-")
    assert new_weights_id(once).count("-ft-") == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [("/none", "does not exist"), ("/proc", "holds no config.json"), ("/" + "x" * 300, "cannot be read")],
)
def test_what_is_no_checkpoint_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base_weights(path, {})


def test_a_base_model_may_be_called_like_a_fine_tune() -> None:
    base = Weights("mine-ft-0123456789ab", "/base")
    tuned = Weights(new_weights_id(base), "/tuned", base.id)
    assert base.base == tuned.base == base.id
