"""Real vLLM and the real trainer in one slot, on a tiny model that the test makes."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import dspy
import httpx
import psutil
import pytest
import torch
from conftest import SUPPORT
from safetensors.torch import load_file
from support.object_store import ObjectStore
from support.processes import wait_for

from bt_ray.errors import StorageError, TaskError, TrainingError
from bt_ray.models import Endpoint
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import LMConfig, ServerConfig, TrainConfig
from bt_ray.slot.base_models import base_weights, content_digest
from bt_ray.slot.canary import TOLERANCE, TOLERANCE_FLOAT32
from bt_ray.slot.serving.server import ServerProcess
from bt_ray.slot.slot import Slot
from bt_ray.trial.lm import ServedEngine, make_served_lm
from bt_ray.weights import Weights

pytestmark = pytest.mark.timeout(600)
TOKEN = "the-token-of-this-sweep"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([sys.executable, str(SUPPORT / "tiny_model.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def slot(run_dir: Path) -> Iterator[Slot]:
    config = ServerConfig.model_validate({"threads": 2, "max_model_len": 256, "max_num_seqs": 8})
    made = Slot("e2e", config, token=TOKEN, host="127.0.0.1", storage=open_storage(str(run_dir)))
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
    tiny_model: Path, slot: Slot, run_dir: Path
) -> None:
    base = base_weights(str(tiny_model), {})
    endpoint = slot.serve(base)
    before = text(ask(endpoint, base.id))
    assert before != ANSWER
    assert slot.serve(base) == endpoint, "a healthy server of the same weights is kept"
    assert slot.change.how == "kept"
    check_refusals(endpoint, base.id)
    check_prompt_that_does_not_fit(endpoint, base)
    server = slot.status().pid
    processes = [psutil.Process(server), *psutil.Process(server).children(recursive=True)]
    assert all(TOKEN not in " ".join(process.cmdline()) for process in processes)

    trained = slot.train(
        base,
        [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}] * 8,
        TrainConfig(method="full", epochs=20, learning_rate=3e-3, batch_size=8),
        seed=0,
    )
    assert all(process.is_running() for process in processes), "the server stays up, closed"
    assert ask(endpoint, base.id).status_code == 503
    assert (run_dir / trained.path / "model.safetensors").exists()
    assert (run_dir / trained.path / "chat_template.jinja").exists()
    assert content_digest(run_dir / trained.path, {}) != content_digest(tiny_model, {})

    assert slot.serve(trained) != endpoint
    assert (slot.change.how, slot.status().pid) == ("swap", server), slot.change
    assert text(ask(slot.serve(trained), trained.id)) == ANSWER
    for _ in range(20):
        refused = ask(endpoint, base.id)
        assert refused.status_code == 409, "a stale client gets refusals only"
        assert (refused.json()["error"]["serving"], refused.json()["error"]["asked"]) == (trained.id, base.id)
    swapped = [answer_in_full(slot.serve(weights)) for weights in (trained, base, trained)]
    assert slot.change.how == "swap"
    assert swapped[0] == swapped[2] != swapped[1]

    slot.stop()
    fresh = [answer_in_full(slot.serve(weights)) for weights in (trained, base)]
    assert slot.change.how == "swap"
    assert fresh == swapped[:2], "token by token, to the last bit"


def test_in_float32_a_fine_tune_that_changes_little_is_swapped_in_verified(tiny_model: Path, tmp_path: Path) -> None:
    config = ServerConfig.model_validate({"threads": 1, "max_model_len": 256, "max_num_seqs": 8, "dtype": "float32"})
    slot = Slot("e2e", config, token=TOKEN, host="127.0.0.1", storage=open_storage(str(tmp_path)))
    base = base_weights(str(tiny_model), {})
    conversations = [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}] * 8
    learn = TrainConfig(method="full", epochs=20, learning_rate=3e-3, batch_size=8, dtype="float32")
    nudge = TrainConfig(method="full", epochs=1, learning_rate=1e-4, batch_size=8, dtype="float32")
    try:
        before = text(ask(slot.serve(base), base.id))
        learnt = slot.train(base, conversations, learn, seed=0)
        assert text(ask(slot.serve(learnt), learnt.id)) == ANSWER != before
        assert slot.change.how == "swap", slot.change
        nudged = slot.train(learnt, conversations, nudge, seed=0)
        slot.serve(nudged)
        assert slot.change.how == "swap", slot.change
        kept = [json.loads((tmp_path / weights.path / "bt_ray_weights.json").read_text()) for weights in (learnt, nudged)]
        assert all(record["canary"]["dtype"] == "float32" for record in kept)
        assert 2 * TOLERANCE_FLOAT32 < kept[1]["canary"]["margin"] < 2 * TOLERANCE, "too little to be told in bfloat16"
        assert {tensor.dtype for tensor in load_file(tmp_path / nudged.path / "model.safetensors").values()} == {
            torch.bfloat16
        }
    finally:
        slot.close()


def answer_in_full(endpoint: Endpoint) -> Any:
    """Tokens and log-probabilities of several answers."""
    answers = []
    for question in ("Say it.", "What is it?", "Is it so? Or is it not?"):
        body = {"model": endpoint.weights_id, "messages": [{"role": "user", "content": question}], "max_tokens": 12}
        body |= {"temperature": 0, "logprobs": True}
        response = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=endpoint.headers, timeout=120)
        assert response.status_code == 200, response.text
        answers.append(
            [(entry["token"], entry["logprob"]) for entry in response.json()["choices"][0]["logprobs"]["content"]]
        )
    return answers


def learnt(slot: Slot, tiny_model: Path, run_dir: Path, answer: str) -> Weights:
    """A fine-tune that says `answer`."""
    conversations = [{"messages": [*QUESTION, {"role": "assistant", "content": answer}]}] * 8
    config = TrainConfig(method="full", epochs=20, learning_rate=3e-3, batch_size=8)
    return slot.train(base_weights(str(tiny_model), {}), conversations, config, seed=0)


def test_weights_that_learnt_something_else_are_found_out_and_so_are_damaged_ones(
    tiny_model: Path, slot: Slot, run_dir: Path
) -> None:
    base = base_weights(str(tiny_model), {})
    right, other = (learnt(slot, tiny_model, run_dir, answer) for answer in ("it is dark", "it is late"))
    file = run_dir / right.path / "model.safetensors"
    whole = file.read_bytes()
    slot.serve(base)
    file.write_bytes((run_dir / other.path / "model.safetensors").read_bytes())
    with pytest.raises(StorageError, match="is not as its training left it"):
        slot.serve(right)
    assert text(ask(slot.serve(other), other.id)) == "it is late"
    file.write_bytes(whole[:-100])
    with pytest.raises(StorageError, match=r"model\.safetensors is"):
        slot.serve(right)
    file.write_bytes(whole)
    slot.serve(base)
    assert text(ask(slot.serve(right), right.id)) == "it is dark"
    assert slot.change.how == "swap"


def test_an_engine_that_loads_other_weights_than_it_was_told_is_started_anew(
    tiny_model: Path, slot: Slot, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_weights(str(tiny_model), {})
    right, other = (learnt(slot, tiny_model, run_dir, answer) for answer in ("it is dark", "it is late"))
    slot.serve(base)
    load = ServerProcess.load

    def load_other(server: ServerProcess, weights: Weights) -> None:
        load(server, replace(weights, path=str(run_dir / other.path)))

    monkeypatch.setattr(ServerProcess, "load", load_other)
    assert text(ask(slot.serve(right), right.id)) == "it is dark"
    assert slot.change.how == "start"
    assert "does not answer as the weights" in slot.change.reason


def check_prompt_that_does_not_fit(endpoint: Endpoint, base: Weights) -> None:
    class Here:
        @contextmanager
        def request(self, weights_id: str) -> Iterator[Endpoint]:
            yield endpoint

    engine = ServedEngine(Here(), None, retries=0, timeout_s=60, max_connections=1)  # type: ignore[arg-type]
    with pytest.raises(dspy.ContextWindowExceededError, match="maximum context length"):
        make_served_lm(base, engine, LMConfig(max_tokens=1))("word " * 1000)


def check_refusals(endpoint: Endpoint, weights_id: str) -> None:
    assert ask(endpoint, weights_id, Authorization="Bearer of-another-sweep").status_code == 401
    routes = httpx.get(f"{endpoint.url}/openapi.json", headers=endpoint.headers).json()["paths"]
    control = [f"/bt_ray/{name}" for name in ("status", "close", "load", "canary", "open", "probe", "sleep", "wake")]
    for route in control:
        for method in ("GET", "POST"):
            for headers in ({}, {"Authorization": "Bearer of-another-sweep"}):
                answer = httpx.request(method, f"{endpoint.url}{route}", headers=headers, timeout=30)
                assert answer.status_code == 401, f"{method} {route} with {headers}"
    control = ["/pause", "/resume", "/sleep", "/collective_rpc", "/v1/load_lora_adapter", "/reset_prefix_cache", "/docs"]
    asked = 0
    for route, methods in {**routes, **{route: {"post": {}, "get": {}} for route in control}}.items():
        for method in methods:
            for headers in ({}, {"Authorization": "Bearer of-another-sweep"}):
                answer = httpx.request(method.upper(), f"{endpoint.url}{route}", headers=headers, timeout=30)
                assert answer.status_code == 401, f"{method} {route} with {headers}"
                asked += 1
    assert asked > 40
    for route in control:
        answer = httpx.post(f"{endpoint.url}{route}", headers=endpoint.headers, timeout=30)
        assert answer.status_code == 404, f"{route} is open to whoever has the token"


def test_prompts_that_leave_no_room_for_an_answer_are_the_users_to_mend(tiny_model: Path, slot: Slot) -> None:
    base = base_weights(str(tiny_model), {})
    conversations: list[dict[str, Any]] = [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}] * 2
    with pytest.raises(TaskError, match=r"2 of 2 training examples .* set train\.max_length higher"):
        slot.train(base, conversations, TrainConfig(max_length=8), seed=0)


def test_lora_is_merged_into_a_checkpoint(tiny_model: Path, slot: Slot, run_dir: Path) -> None:
    base = base_weights(str(tiny_model), {})
    conversations: list[dict[str, Any]] = [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}] * 4
    config = TrainConfig(epochs=2, learning_rate=1e-3, batch_size=4)
    trained = slot.train(base, conversations, config, seed=0)
    names = sorted(path.name for path in (run_dir / trained.path).iterdir())
    assert not [name for name in names if "adapter" in name]
    assert "model.safetensors" in names
    assert trained.parent == base.id
    (progress,) = run_dir.glob(f"trainings/*/{trained.id}/progress.jsonl")
    assert len(progress.read_text().splitlines()) == 2, "one line for each optimizer step"
    assert slot.train(base, conversations, config, seed=0) == trained, "the same fine-tune is not repeated"


@pytest.mark.parametrize(("method", "by_length"), [("lora", False), ("full", True)])
def test_a_fine_tune_that_was_cut_off_goes_on_from_its_last_checkpoint(
    tiny_model: Path, tmp_path: Path, method: Literal["lora", "full"], by_length: bool
) -> None:
    base = base_weights(str(tiny_model), {})
    said = [f"it is {word}" for word in ("so", "not so", "late", "early", "dark", "bright")]
    if by_length:
        said = [text + 10 * number * " and on" for number, text in enumerate(said)]
    conversations = [{"messages": [*QUESTION, {"role": "assistant", "content": text}]} for text in said]
    config = TrainConfig(method=method, epochs=20, batch_size=2, lora_dropout=0.1, checkpoint_every_s=0, learning_rate=1e-3)

    def slot_in(folder: Path) -> Slot:
        settings = ServerConfig.model_validate({"threads": 1})
        return Slot("e2e", settings, token=TOKEN, host="127.0.0.1", storage=open_storage(str(folder)))

    undisturbed = slot_in(tmp_path / "a").train(base, conversations, config, seed=3)
    run_dir, slot = tmp_path / "b", slot_in(tmp_path / "b")

    def kill_at_a_checkpoint() -> None:
        wait_for("a checkpoint", lambda: list(run_dir.glob("trainings/*/*/checkpoints/*[5-9]/bt_ray_checkpoint.json")))
        psutil.Process(slot.status().pid).kill()

    killer = threading.Thread(target=kill_at_a_checkpoint)
    killer.start()
    with pytest.raises(TrainingError, match="ended with status -9"):
        slot.train(base, conversations, config, seed=3)
    killer.join()
    (cut_off,) = run_dir.glob("trainings/*/*/progress.jsonl")
    got_to = len(cut_off.read_text().splitlines())
    assert 5 <= got_to < 60
    assert not [file for file in run_dir.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")], "no pickle"

    trained = slot.train(base, conversations, config, seed=3)
    (job,) = run_dir.glob(f"trainings/*/{trained.id}/job.json")
    started_at = int(json.loads(job.read_text())["checkpoint"].rpartition("-")[2])
    assert got_to - 1 <= started_at <= got_to
    (progress,) = run_dir.glob(f"trainings/*/{trained.id}/progress.jsonl")
    (reference,) = tmp_path.glob(f"a/trainings/*/{undisturbed.id}/progress.jsonl")
    losses, expected = losses_of(progress), losses_of(reference)
    assert list(losses) == list(expected) == list(range(1, 61))
    assert losses == pytest.approx(expected, abs=1e-4)
    ours = load_file(run_dir / trained.path / "model.safetensors")
    theirs = load_file(tmp_path / "a" / undisturbed.path / "model.safetensors")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)
    assert not list(run_dir.glob("trainings/*/*/checkpoints")), "checkpoints go when the weights are there"


def losses_of(progress: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.long
def test_weights_from_an_object_store_are_served_on_another_node(
    tiny_model: Path, tmp_path: Path, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_weights(str(tiny_model), {})
    conversations = [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}] * 8
    config = TrainConfig(method="full", epochs=20, learning_rate=3e-3, batch_size=8)
    storage = open_storage(f"s3://bucket/{tmp_path.name}")

    def slot_on(node: str) -> Slot:
        monkeypatch.setenv("BT_RAY_CACHE", str(tmp_path / node))
        settings = ServerConfig.model_validate({"threads": 2, "max_model_len": 256, "max_num_seqs": 8})
        return Slot("e2e", settings, token=TOKEN, host="127.0.0.1", storage=storage)

    there, here = slot_on("there"), slot_on("here")
    trained = there.train(base, conversations, config, seed=0)
    assert storage.names(trained.path)[-1] == "tokenizer_config.json"
    endpoint = here.serve(trained)
    assert text(ask(endpoint, trained.id)) == ANSWER
    assert [folder.name for folder in (tmp_path / "here" / "weights").glob("[!.]*")] == [trained.id]
    for slot in (there, here):
        slot.close()
    assert not list((tmp_path / "here" / "scratch").iterdir()), "nothing else is left on the node"
    assert storage.names("logs") == [f"e2e-{trained.id}.log"]
