"""Real vLLM and the real trainer in one slot, on a tiny model that the test makes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import SUPPORT

from bt_ray.config import ServerConfig, TrainConfig
from bt_ray.errors import TaskError
from bt_ray.serving.server import Endpoint
from bt_ray.slot import Slot
from bt_ray.weights import base_weights, content_digest, new_weights_id

pytestmark = pytest.mark.timeout(600)
TOKEN = "the-token-of-this-sweep"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([sys.executable, str(SUPPORT / "tiny_model.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slot]:
    config = ServerConfig.model_validate({"threads": 2, "max_model_len": 256, "max_num_seqs": 8})
    made = Slot("e2e", config, token=TOKEN, host="127.0.0.1", log_dir=tmp_path_factory.mktemp("logs"))
    yield made
    made.stop()


def ask(endpoint: Endpoint, weights_id: str, **headers: str) -> httpx.Response:
    body = {"model": weights_id, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    sent = headers or endpoint.headers
    return httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=sent, timeout=120)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


QUESTION = [{"role": "user", "content": "Say it."}]
ANSWER = "it is so"


def test_a_model_is_served_fine_tuned_and_served_again_with_another_answer(
    tiny_model: Path, slot: Slot, tmp_path: Path
) -> None:
    base = base_weights(str(tiny_model), {})
    endpoint = slot.serve(base)
    before = text(ask(endpoint, base.id))
    assert before != ANSWER
    assert slot.serve(base) == endpoint, "a healthy server of the same weights is kept"
    check_refusals(endpoint, base.id)
    processes = psutil.Process(slot.status().pid).children(recursive=True)
    assert all(TOKEN not in " ".join(process.cmdline()) for process in [psutil.Process(slot.status().pid), *processes])

    trained = slot.train(
        base,
        new_weights_id(base),
        [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}] * 8,
        TrainConfig(method="full", epochs=20, learning_rate=3e-3, batch_size=8),
        seed=0,
        output_dir=tmp_path / "full",
    )
    assert not [process for process in processes if process.is_running()], "the server gave way to the training"
    assert (tmp_path / "full" / "model.safetensors").exists()
    assert (tmp_path / "full" / "chat_template.jinja").exists()
    assert content_digest(Path(trained.path), {}) != content_digest(tiny_model, {})

    endpoint = slot.serve(trained)
    assert text(ask(endpoint, trained.id)) == ANSWER
    refused = ask(endpoint, base.id)
    assert refused.status_code == 409
    assert (refused.json()["error"]["serving"], refused.json()["error"]["asked"]) == (trained.id, base.id)


def check_refusals(endpoint: Endpoint, weights_id: str) -> None:
    assert ask(endpoint, weights_id, Authorization="Bearer of-another-sweep").status_code == 401
    routes = httpx.get(f"{endpoint.url}/openapi.json", headers=endpoint.headers).json()["paths"]
    control = ["/pause", "/resume", "/sleep", "/collective_rpc", "/v1/load_lora_adapter", "/reset_prefix_cache", "/docs"]
    asked = 0
    for route, methods in {**routes, **{route: {"post": {}, "get": {}} for route in control}}.items():
        for method in methods:
            answer = httpx.request(method.upper(), f"{endpoint.url}{route}", timeout=30)
            assert answer.status_code == 401, f"{method} {route} without the token"
            asked += 1
    assert asked > 20
    for route in control:
        answer = httpx.post(f"{endpoint.url}{route}", headers=endpoint.headers, timeout=30)
        assert answer.status_code == 404, f"{route} is open to whoever has the token"


def test_prompts_that_leave_no_room_for_an_answer_are_the_users_to_mend(
    tiny_model: Path, slot: Slot, tmp_path: Path
) -> None:
    base = base_weights(str(tiny_model), {})
    conversations: list[dict[str, Any]] = [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}] * 2
    with pytest.raises(TaskError, match=r"2 of 2 training examples .* set train\.max_length higher"):
        slot.train(base, "ft", conversations, TrainConfig(max_length=8), seed=0, output_dir=tmp_path / "cut")


def test_lora_is_merged_into_a_checkpoint(tiny_model: Path, slot: Slot, tmp_path: Path) -> None:
    base = base_weights(str(tiny_model), {})
    conversations: list[dict[str, Any]] = [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}] * 4
    config = TrainConfig(epochs=2, learning_rate=1e-3, batch_size=4)
    trained = slot.train(base, new_weights_id(base), conversations, config, seed=0, output_dir=tmp_path / "lora")
    names = sorted(path.name for path in Path(trained.path).iterdir())
    assert not [name for name in names if "adapter" in name]
    assert "model.safetensors" in names
    assert trained.parent == base.id
    progress = (tmp_path / "lora.progress.jsonl").read_text().splitlines()
    assert len(progress) == 2, "one line for each optimizer step"
