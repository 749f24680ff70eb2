"""The ids of weights: one for each content that answers."""

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from support.hub_copy import write_ref

from bt_ray.errors import ConfigError
from bt_ray.settings.config import ServerConfig
from bt_ray.slot import file_digest
from bt_ray.slot.base_models import base_weights
from bt_ray.slot.hub import find_commit
from bt_ray.slot.serving.server import server_command
from bt_ray.weights import Weights, new_weights_id

SIZE = 8 * 1024 * 1024


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(SIZE))
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
    content[SIZE // 2 + 12_345] ^= 1  # one bit, wherever it is
    file.write_bytes(content)
    ids.add(base_weights(str(checkpoint), {}).id)
    ids |= {base_weights("org/model", {}).id, base_weights("org/model", {"revision": "f" * 40}).id}
    assert len(ids) == 5


def test_a_model_of_the_hub_is_its_commit_whatever_it_is_called_by() -> None:
    write_ref("org/moved", commit="a" * 40)
    write_ref("org/moved", "v1", commit="a" * 40)
    first = base_weights("org/moved", {})
    assert first.revision == "a" * 40
    assert base_weights("org/moved", {"revision": "v1"}) == base_weights("org/moved", {"revision": "a" * 40}) == first
    write_ref("org/moved", commit="b" * 40)
    find_commit.cache_clear()
    assert base_weights("org/moved", {}).id != first.id
    arguments = server_command(first, ServerConfig(revision="v1"), None, 3)  # type: ignore[call-arg]
    assert arguments[arguments.index("--revision") + 1] == "a" * 40


def test_a_commit_that_nobody_can_tell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"commit of org/unknown, revision main, .* offline .* server\.revision"):
        base_weights("org/unknown", {})


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub/api"))


class Hub:
    """Says what the hub says of models."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer

    def model_info(self, model: str, **how: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(sha=self.answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("c" * 40, ""),
        (httpx.ConnectTimeout("too late"), "the hub cannot be reached (too late)"),
        (RepositoryNotFoundError("404", response=response(404)), "the hub has no such model"),
        (RevisionNotFoundError("404", response=response(404)), "has no revision main of org/online"),
        (GatedRepoError("403", response=response(403)), "org/online is gated"),
    ],
    ids=["there", "unreachable", "no model", "no revision", "gated"],
)
def test_what_the_hub_says_counts(answer: str | Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(answer))
    find_commit.cache_clear()
    if not said:
        assert find_commit("org/online") == answer
        return
    with pytest.raises(ConfigError) as caught:
        find_commit("org/online")
    assert said in str(caught.value)


def test_a_large_file_is_read_once_and_again_when_it_changed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digest, "SETTLED_S", -1.0)
    read: list[str] = []
    hashing = hashlib.file_digest

    def noted(opened: Any, name: str) -> Any:
        read.append(Path(opened.name).name)
        return hashing(opened, name)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    file = checkpoint / "model.safetensors"
    first = base_weights(str(checkpoint), {}).id
    assert base_weights(str(checkpoint), {}).id == first
    assert read.count("model.safetensors") == 1
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    with file.open("r+b") as opened:
        opened.write(bytes(8))
    os.utime(file, ns=times)  # as a copy that keeps times would
    assert base_weights(str(checkpoint), {}).id != first
    assert read.count("model.safetensors") == 2


def test_a_file_that_has_just_changed_is_read_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BT_RAY_CACHE", str(checkpoint.parent / "cache"))
    file_digest.digest_file(checkpoint / "model.safetensors")
    assert not (checkpoint.parent / "cache" / file_digest.DIGESTS).exists()


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
