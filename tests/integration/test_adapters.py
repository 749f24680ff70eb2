"""Fine-tunes that are adapters, several of which one server serves at once. Scripted processes behind the real guard."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from support.scripted_model import write_model
from support.slot_host import DATA, Host, ask

import bt_ray
from bt_ray.errors import ConfigError
from bt_ray.settings.config import TrainConfig, make_config
from bt_ray.slot.slot import Slot
from bt_ray.slot.training.job import check_trainable
from bt_ray.weights import Weights


def trained_twice(host: Host, slot: Slot) -> tuple[Weights, Weights]:
    """Adapters of skill 5 and 8: the second is the first one, trained on."""
    first = host.train(slot)
    return first, slot.train(first, DATA, host.config.train, seed=0)


def test_adapters_are_served_beside_each_other_and_their_base(host: Host) -> None:
    slot = host.slot(fine_tunes="adapters")
    base = slot.serve(host.base)
    pid = slot.status().pid
    first, second = trained_twice(host, slot)
    assert (first.on, second.on, second.parent) == (host.base, host.base, first.id)
    endpoints = [slot.serve(first, [host.base]), slot.serve(second, [first, host.base]), base]
    assert (slot.change.how, slot.status().pid) == ("swap", pid)
    assert {endpoint.url for endpoint in endpoints} == {base.url}
    for _ in range(3):
        assert [ask(endpoint, 4) for endpoint in endpoints] == ["8", "8", "wrong"]
        assert [ask(endpoint, 7) for endpoint in endpoints] == ["wrong", "14", "wrong"]
    host.train(slot, seed=1)
    slot.serve(first, [second, host.base])
    assert slot.change.how == "reopened", "a training leaves them loaded"


def test_the_oldest_adapter_goes_when_there_is_no_room_and_its_clients_get_refusals(host: Host) -> None:
    slot = host.slot(fine_tunes="adapters", max_loras=1)
    slot.serve(host.base)
    first, second = trained_twice(host, slot)
    before = slot.serve(first)
    after = slot.serve(second)
    assert (slot.change.how, ask(after, 7)) == ("swap", "14")
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        ask(before)
    assert ask(slot.serve(first), 7) == "wrong"


@pytest.mark.parametrize("fault", ["fail_load", "wrong_load"])
def test_an_adapter_that_fails_or_answers_otherwise_is_a_start_with_all_that_is_wanted(host: Host, fault: str) -> None:
    slot = host.slot(fine_tunes="adapters")
    slot.serve(host.base)
    first, second = trained_twice(host, slot)
    pid, known = slot.status().pid, slot.serve(first)
    write_model(host.faults / "other", skill=2)
    (host.faults / fault).write_text(str(host.faults / "other"))
    after = slot.serve(second, [first, host.base])
    assert slot.change.how == "start"
    assert slot.change.reason.startswith(f"A swap to {second.id} failed: ")
    assert slot.status().pid != pid
    assert ask(after, 7) == "14"
    assert ask(slot.serve(first, [second]), 4) == "8"
    assert slot.change.how == "kept"
    with pytest.raises(httpx.TransportError):
        ask(known)


def test_a_damaged_adapter_never_reaches_the_engine(host: Host) -> None:
    slot = host.slot(fine_tunes="adapters")
    slot.serve(host.base)
    first, _ = trained_twice(host, slot)
    file = host.file(first)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(bt_ray.BtRayError, match="is not as its training left it"):
        host.slot(fine_tunes="adapters").serve(first)


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_with_adapters_starts_one_server_and_its_best_program_answers(
    settings: dict[str, Any], request_log: Any
) -> None:
    server = {**settings["server"], "count": 1, "fine_tunes": "adapters"}
    result = bt_ray.sweep(settings["task"], {**settings, "server": server, "strategies": ["p -> w", "w -> p", "w -> w"]})
    assert [trial.best.score for trial in result.trials if trial.best] == [70.0, 70.0, 80.0]
    assert len({request["pid"] for request in request_log()}) == 1
    best = bt_ray.load(Path(settings["run_dir"]) / "best")
    assert best(question="number 27").answer == "54"
    assert best(question="number 28").answer == "wrong"
    best.lm.kill()


def test_a_training_that_leaves_no_adapter_that_servers_can_load_is_refused(settings: dict[str, Any]) -> None:
    server = make_config({**settings, "server": {"fine_tunes": "adapters", "max_lora_rank": 8}}).server
    with pytest.raises(ConfigError, match="a full fine-tune leaves no adapter"):
        check_trainable(server, TrainConfig(method="full"))
    with pytest.raises(ConfigError, match=r"lora_rank = 16 is more than server\.max_lora_rank = 8"):
        check_trainable(server, TrainConfig())
    check_trainable(server, TrainConfig(lora_rank=8))
