"""Real vLLM with several adapters of the real trainer at once, on a tiny model that the test makes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SUPPORT
from test_vllm_slot import QUESTION, TOKEN, answer_in_full, ask, text

from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import ServerConfig, TrainConfig
from bt_ray.slot.base_models import base_weights
from bt_ray.slot.slot import Slot
from bt_ray.weights import Weights

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([sys.executable, str(SUPPORT / "tiny_model.py"), str(folder)], check=True)
    return base_weights(str(folder), {})


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    settings = {"threads": 2, "max_model_len": 256, "max_num_seqs": 8, "fine_tunes": "adapters", "max_loras": 2}
    config = ServerConfig.model_validate(settings)
    made = Slot("adapters", config, token=TOKEN, host="127.0.0.1", storage=open_storage(str(tmp_path)))
    yield made
    made.close()


def learnt(slot: Slot, parent: Weights, answer: str) -> Weights:
    conversations = [{"messages": [*QUESTION, {"role": "assistant", "content": answer}]}] * 8
    return slot.train(parent, conversations, TrainConfig(epochs=60, learning_rate=3e-3, batch_size=8), seed=0)


def test_one_engine_serves_its_base_and_two_adapters_each_by_its_own_weights(
    base: Weights, slot: Slot, tmp_path: Path
) -> None:
    endpoint = slot.serve(base)
    server, before = slot.status().pid, answer_in_full(endpoint)
    dark, late = (learnt(slot, base, answer) for answer in ("it is dark", "it is late"))
    early = learnt(slot, late, "it is early")
    names = {path.name for path in (tmp_path / dark.path).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    assert json.loads((tmp_path / early.path / "bt_ray_weights.json").read_text())["parent"] == late.id

    alone = answer_in_full(slot.serve(dark, [base]))
    slot.serve(late, [dark, base])
    assert (slot.change.how, slot.status().pid) == ("swap", server), slot.change
    for _ in range(3):
        assert [text(ask(endpoint, weights.id)) for weights in (dark, late)] == ["it is dark", "it is late"]
        assert answer_in_full(endpoint) == before, "their base answers as it did alone"
    assert answer_in_full(slot.serve(dark, [late, base])) == alone
    assert slot.change.how == "kept"
    assert ask(endpoint, early.id).status_code == 409
    assert text(ask(slot.serve(early, [dark]), early.id)) == "it is early"
    assert (slot.change.how, slot.status().pid) == ("swap", server), slot.change
    assert ask(endpoint, late.id).status_code == 409, "there is room for two"
