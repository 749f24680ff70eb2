"""Fine-tunes that are cut off go on, on this node or another; none is repeated. On every kind of storage."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.processes import wait_for
from test_slot import Call

from bt_ray.errors import StorageError, TrainingError
from bt_ray.run_dir.storage import Storage
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.slot.base_models import base_weights
from bt_ray.slot.slot import Slot
from bt_ray.slot.training import job as training_job
from bt_ray.slot.training.job import training_key
from bt_ray.weights import Weights

DATA = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}]


@pytest.fixture(autouse=True)
def looked_after_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_job, "LOOK_S", 0.1)


@pytest.fixture
def config(settings: dict[str, Any]) -> SweepConfig:
    return make_config(settings)


@pytest.fixture
def base(config: SweepConfig) -> Weights:
    return base_weights(config.model, {})


def node(config: SweepConfig, storage: Storage, monkeypatch: pytest.MonkeyPatch, cache: Path, **env: str) -> Slot:
    """A slot on a node of its own."""
    monkeypatch.setenv("BT_RAY_CACHE", str(cache))
    server = config.server.model_copy(update={"env": {**config.server.env, **env}})
    return Slot("slot", server, token="token", host="127.0.0.1", storage=storage)


def saved(storage: Storage, key: str) -> list[str]:
    """The checkpoints in the run directory."""
    folders = [f"trainings/{key}/{attempt}/checkpoints" for attempt in storage.names(f"trainings/{key}")]
    return [f"{folder}/{name}" for folder in folders for name in storage.names(folder)]


def cut_off(slot: Slot, storage: Storage, base: Weights, config: SweepConfig, key: str) -> None:
    """Start a training that takes two steps, and kill its process when their checkpoint is kept."""
    call = Call(slot.train, base, DATA, config.train, seed=0)
    wait_for("a checkpoint", lambda: any("checkpoint-2" in name for name in saved(storage, key)))
    psutil.Process(slot.status().pid).kill()
    assert isinstance(call.error(), TrainingError)


def test_a_training_that_was_cut_off_goes_on_on_another_node(
    config: SweepConfig, base: Weights, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = training_key(base, DATA, config.train, seed=0, adapter=False)
    (hold := tmp_path / "hold").write_text("2")
    slot = node(config, storage, monkeypatch, tmp_path / "a", SCRIPTED_TRAIN_HOLD=str(hold))
    cut_off(slot, storage, base, config, key)
    assert storage.names("weights") == [], "nothing half-written is left"
    there = node(config, storage, monkeypatch, tmp_path / "b")
    trained = there.train(base, DATA, config.train, seed=0)
    attempt = f"trainings/{key}/{trained.id}"
    assert "/checkpoint-" in storage.read_json(f"{attempt}/job.json")["checkpoint"]
    lines = (storage.read(f"{attempt}/progress.jsonl") or b"").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4], "each step once"
    assert saved(storage, key) == []
    assert storage.names("weights") == [trained.id]
    assert there.train(base, DATA, config.train, seed=0) == trained, "it is not repeated"
    endpoint = there.serve(trained)
    assert endpoint.weights_id == trained.id
    there.stop()
    assert storage.names("logs") == [f"slot-{trained.id}.log"]


def test_a_checkpoint_that_leads_nowhere_is_removed(
    config: SweepConfig, base: Weights, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = training_key(base, DATA, config.train, seed=0, adapter=False)
    (hold := tmp_path / "hold").write_text("2")
    slot = node(config, storage, monkeypatch, tmp_path / "a", SCRIPTED_TRAIN_HOLD=str(hold))
    cut_off(slot, storage, base, config, key)
    before = saved(storage, key)
    with pytest.raises(TrainingError, match="this checkpoint is broken"):
        node(config, storage, monkeypatch, tmp_path / "b", SCRIPTED_CHECKPOINT="broken").train(
            base, DATA, config.train, seed=0
        )
    assert len(saved(storage, key)) == len(before) - 1


def test_other_data_are_another_training(config: SweepConfig, base: Weights) -> None:
    other = [{"messages": [*DATA[0]["messages"], {"role": "user", "content": "?"}]}]
    keys = {
        training_key(base, DATA, config.train, seed=0, adapter=False),
        training_key(base, other, config.train, seed=0, adapter=False),
        training_key(base, DATA, config.train, seed=1, adapter=False),
        training_key(Weights("other", "/other"), DATA, config.train, seed=0, adapter=False),
        training_key(base, DATA, config.train.model_copy(update={"epochs": 9}), seed=0, adapter=False),
    }
    assert len(keys) == 5
    slower = config.train.model_copy(update={"timeout_s": 5.0, "checkpoint_every_s": 1.0})
    assert training_key(base, DATA, slower, seed=0, adapter=False) in keys


def test_a_checkpoint_that_cannot_be_kept_does_not_stop_the_training(
    config: SweepConfig, base: Weights, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = type(storage).upload

    def failing(self: Storage, folder: Path, name: str, last: str) -> None:
        if "checkpoint-" in name:
            raise StorageError("no room for a checkpoint")
        upload(self, folder, name, last)

    monkeypatch.setattr(type(storage), "upload", failing)
    slot = node(config, storage, monkeypatch, tmp_path / "a", SCRIPTED_TRAIN_S="1")
    assert storage.names("weights") == []
    assert slot.train(base, DATA, config.train, seed=0).id in storage.names("weights")
