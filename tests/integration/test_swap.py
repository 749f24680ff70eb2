"""Other weights in a server that stays up, and what happens when that fails. Scripted processes behind the real guard."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.processes import wait_for
from support.scripted_model import write_model
from support.slot_host import Host, ask

from bt_ray.errors import InfrastructureError, StorageError
from bt_ray.run_dir.storage import Directory
from bt_ray.weights import MANIFEST, Weights, fine_tuned


def test_a_server_stays_up_through_a_training_and_swaps_there_and_back(host: Host) -> None:
    slot = host.slot()
    before = slot.serve(host.base)
    pid = slot.status().pid
    assert ask(before) == "wrong"
    trained = host.train(slot)
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        ask(before)
    after = slot.serve(trained)
    assert (after.url, ask(after)) == (before.url, "8")
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        ask(before)
    for weights, answer in ((host.base, "wrong"), (trained, "8")):
        assert ask(slot.serve(weights)) == answer
        assert (slot.change.how, slot.change.reason, slot.status().pid) == ("swap", "", pid)
    assert slot.serve(trained) == after
    assert slot.change.how == "kept"
    for weights in (host.base, trained):
        assert list(json.loads((host.run_dir / "canaries" / f"{weights.id}.json").read_text())) == ["cpu: scripted"]


def test_a_server_that_was_closed_for_a_training_opens_again(host: Host) -> None:
    slot = host.slot()
    slot.serve(host.base)
    host.train(slot)
    assert ask(slot.serve(host.base)) == "wrong"
    assert slot.change.how == "reopened"


def without_trainers_record(host: Host, weights: Weights) -> None:
    file = host.file(weights, MANIFEST)
    file.write_text(json.dumps({**json.loads(file.read_text()), "canary": None}))


def with_a_blunt_record(host: Host, weights: Weights) -> None:
    file = host.file(weights, MANIFEST)
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "canary": {**manifest["canary"], "margin": 0.1}}))


def with_a_failing_load(host: Host, weights: Weights) -> None:
    (host.faults / "fail_load").write_text("no memory left")


def with_a_load_of_other_weights(host: Host, weights: Weights) -> None:
    write_model(host.faults / "other", skill=9)
    (host.faults / "wrong_load").write_text(str(host.faults / "other"))


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (without_trainers_record, "nothing tells yet how these weights answer"),
        (with_a_blunt_record, "nothing tells yet how these weights answer"),
        (with_a_failing_load, "the reload failed: no memory left"),
        (with_a_load_of_other_weights, "does not answer as the weights"),
    ],
)
def test_a_swap_that_fails_or_cannot_be_verified_is_a_start_with_the_reason(
    host: Host, cause: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    slot = host.slot()
    slot.serve(host.base)
    pid = slot.status().pid
    trained = host.train(slot)
    cause(host, trained)
    assert ask(slot.serve(trained)) == "8"
    assert slot.change.how == "start"
    assert reason in slot.change.reason
    assert not psutil.pid_exists(pid or 0)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in warned if reason in line]) == 1, "it is said once"
    slot.serve(host.base)
    assert ask(slot.serve(trained)) == "8"
    assert slot.change.how == "swap", "by now it is known how they answer"


def test_other_weights_of_the_same_shape_in_the_folder_are_never_served(host: Host) -> None:
    slot = host.slot()
    slot.serve(host.base)
    trained = host.train(slot)
    write_model(host.file(trained).parent, skill=9)
    with pytest.raises(StorageError, match=r"model\.safetensors is not as its training left it"):
        slot.serve(trained)
    assert ask(slot.serve(host.base)) == "wrong"


def test_a_file_that_is_cut_off_never_reaches_the_engine(host: Host) -> None:
    slot = host.slot()
    slot.serve(host.base)
    trained = host.train(slot)
    whole = host.file(trained).read_bytes()
    host.file(trained).write_bytes(whole[:-1])
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        slot.serve(trained)
    host.file(trained).write_bytes(whole)
    assert ask(slot.serve(trained)) == "8"


def test_a_damaged_copy_on_a_nodes_disk_is_copied_again(host: Host) -> None:
    slot = host.slot(storage=Directory(host.run_dir, in_place=False))
    trained = host.train(slot)
    (copy,) = Path(os.environ["BT_RAY_CACHE"], "weights").glob(trained.id)
    write_model(copy, skill=9)
    with pytest.raises(StorageError, match="is not as its training left it"):
        slot.serve(trained)
    assert ask(slot.serve(trained)) == "8"


def test_weights_that_were_fetched_are_served_from_the_nodes_copy(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Directory(host.run_dir, in_place=False)
    trained = host.train(host.slot(storage=storage))
    monkeypatch.setenv("BT_RAY_CACHE", str(tmp_path / "another node"))
    slot = host.slot(storage=storage)
    slot.serve(host.base)
    slot.fetch(trained)
    shutil.rmtree(host.run_dir / trained.path)
    assert ask(slot.serve(trained)) == "8"
    with pytest.raises(StorageError, match="base-ft-lost"):
        slot.fetch(fine_tuned({"id": "base-ft-lost", "parent": "base"}))


def test_a_fresh_start_that_answers_otherwise_than_before_is_an_error(host: Host) -> None:
    host.slot().serve(host.base)
    slot = host.slot()
    record = host.run_dir / "canaries" / f"{host.base.id}.json"
    ((platform, answers),) = json.loads(record.read_text()).items()
    answers[1][0] -= 1e-6
    record.write_text(json.dumps({platform: answers}))
    with pytest.raises(InfrastructureError, match=rf"does not answer as the weights {host.base.id} did before"):
        slot.serve(host.base)
    assert slot.status().state == "idle"
    record.write_text(json.dumps({"cpu: another": answers}))
    assert ask(slot.serve(host.base)) == "wrong", "another platform's answers say nothing about this one's"


@pytest.mark.parametrize(("mode", "how"), [("keep", "swap"), ("sleep", "swap"), ("stop", "start")])
def test_what_the_server_does_during_a_training_is_a_setting(host: Host, mode: str, how: str) -> None:
    (hold := host.faults / "hold").write_text("0")
    slot = host.slot({"SCRIPTED_TRAIN_HOLD": str(hold)}, while_training=mode)
    slot.serve(host.base)
    server = psutil.Process(slot.status().pid)
    trained: list[Weights] = []
    training = threading.Thread(target=lambda: trained.append(host.train(slot)))
    training.start()
    wait_for("the training", lambda: slot.status().state == "training")
    assert slot.status().pid != server.pid
    assert server.is_running() == (mode != "stop")
    hold.unlink()
    training.join()
    assert ask(slot.serve(trained[0])) == "8"
    assert slot.change.how == how


def test_stop_ends_a_kept_server_and_the_training_beside_it(host: Host) -> None:
    slot = host.slot({"SCRIPTED_TRAIN_S": "60"})
    slot.serve(host.base)
    server = psutil.Process(slot.status().pid)
    raised: list[BaseException] = []

    def train() -> None:
        try:
            host.train(slot)
        except InfrastructureError as error:
            raised.append(error)

    training = threading.Thread(target=train)
    training.start()
    wait_for("the training", lambda: slot.status().state == "training")
    trainer = psutil.Process(slot.status().pid)
    slot.stop()
    training.join()
    assert raised
    assert not server.is_running()
    assert not trainer.is_running()
    assert (slot.status().state, slot.status().pid) == ("idle", None)


def test_a_server_that_hangs_is_killed_and_its_clients_see_a_reset(host: Host) -> None:
    slot = host.slot(stall_timeout_s=1.5)
    endpoint = slot.serve(host.base)
    process = psutil.Process(slot.status().pid)
    process.suspend()
    with pytest.raises(httpx.TransportError):
        ask(endpoint)
    wait_for("the watch", lambda: slot.status().state == "dead")
    wait_for("its end", lambda: not process.is_running())
    assert "It hangs" in slot.status().detail
    assert ask(slot.serve(host.base)) == "wrong"
    assert "It hangs" in slot.change.reason


def test_an_engine_that_gives_no_token_is_found_although_its_server_answers(host: Host) -> None:
    slot = host.slot({"SCRIPTED_DELAY_S": "600"}, stall_timeout_s=1.5)
    endpoint = slot.serve(host.base)
    (host.faults / "hang").write_text("")
    with pytest.raises(httpx.TransportError):
        ask(endpoint)
    wait_for("the watch", lambda: slot.status().state == "dead")
    assert "probe" in slot.status().detail


def test_slow_answers_of_an_engine_that_gives_tokens_are_left_alone(host: Host) -> None:
    slot = host.slot({"SCRIPTED_DELAY_S": "5"}, stall_timeout_s=1.5)
    endpoint = slot.serve(host.base)
    pid = slot.status().pid
    assert ask(endpoint) == "wrong"
    assert (slot.status().pid, slot.status().state) == (pid, "serving")


def test_a_server_that_is_stopped_is_not_taken_for_dead(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bt_ray.slot.serving.watch.LOOK_S", 0.002)
    slot = host.slot()
    for _ in range(3):
        slot.serve(host.base)
        slot.stop()
    assert "is dead" not in caplog.text


def test_a_server_that_dies_is_noticed_with_its_last_lines(host: Host) -> None:
    slot = host.slot(stall_timeout_s=1.5)
    slot.serve(host.base)
    os.kill(slot.status().pid or 0, signal.SIGKILL)
    wait_for("the watch", lambda: slot.status().state == "dead")
    assert "ended with status -9" in slot.status().detail
    assert ask(slot.serve(host.base)) == "wrong"
    assert "ended with status -9" in slot.change.reason


def test_requests_that_outlast_the_drain_end_with_an_error_and_the_swap_goes_on(host: Host) -> None:
    slot = host.slot({"SCRIPTED_DELAY_S": "30"}, drain_timeout_s=0.5)
    trained = host.train(slot)
    endpoint = slot.serve(host.base)
    statuses: list[int] = []

    def late() -> None:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            ask(endpoint)
        statuses.append(caught.value.response.status_code)

    client = threading.Thread(target=late)
    client.start()
    status = f"{endpoint.url}/bt_ray/status"
    wait_for("the request", lambda: httpx.get(status, headers=endpoint.headers, timeout=60).json()["in_flight"] == 1)
    began = time.monotonic()
    slot.serve(trained)
    assert time.monotonic() - began < 15
    assert slot.change.how == "swap"
    client.join()
    assert statuses == [503]


def test_nothing_temporary_stays_behind(host: Host) -> None:
    slot = host.slot()
    slot.serve(host.base)
    temporary = Path(psutil.Process(slot.status().pid).environ()["TMPDIR"])
    (temporary / "left by a process that was killed").touch()
    slot.close()
    assert not temporary.exists()
