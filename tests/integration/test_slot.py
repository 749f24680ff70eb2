"""A slot of scripted processes: who stops whom, and what reaches the server."""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.processes import wait_for
from support.scripted_model import write_model

from bt_ray.errors import InfrastructureError, ServerError, TrainingError
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.slot.base_models import base_weights
from bt_ray.slot.child import ChildProcess
from bt_ray.slot.slot import Slot
from bt_ray.trial.failure_latch import FailureLatch
from bt_ray.trial.lm import ServedEngine, make_served_lm
from bt_ray.weights import Weights
from bt_ray.winner.local_models import LocalModels


@pytest.fixture
def config(settings: dict[str, Any]) -> SweepConfig:
    return make_config(settings)


@pytest.fixture
def base(config: SweepConfig) -> Weights:
    return base_weights(config.model, {})


def slot_of(config: SweepConfig, tmp_path: Path, **env: str) -> Slot:
    server = config.server.model_copy(update={"env": {**config.server.env, **env}})
    return Slot("slot", server, token="token", host="127.0.0.1", storage=open_storage(str(tmp_path)))


class Call:
    """A call that waits in a thread of its own."""

    def __init__(self, call: Any, *arguments: Any, **named: Any) -> None:
        self.raised: Exception | None = None

        def run() -> None:
            try:
                call(*arguments, **named)
            except Exception as error:
                self.raised = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def error(self) -> Exception | None:
        self.thread.join()
        return self.raised


@pytest.fixture
def busy(config: SweepConfig, base: Weights, tmp_path: Path) -> Iterator[tuple[Slot, Call]]:
    """A slot whose server takes a minute to start."""
    slot = slot_of(config, tmp_path, SCRIPTED_START_S="60")
    starting = Call(slot.serve, base)
    wait_for("the server to start", lambda: slot.status().pid)
    yield slot, starting
    slot.stop()


def test_stop_ends_a_server_that_is_starting(busy: tuple[Slot, Call]) -> None:
    slot, starting = busy
    slot.stop()
    assert isinstance(starting.error(), ServerError)
    assert slot.status().state == "idle"


def test_stop_ends_what_waits_for_its_turn(
    busy: tuple[Slot, Call], config: SweepConfig, base: Weights, tmp_path: Path
) -> None:
    slot, starting = busy
    waiting = Call(slot.train, base, [{"messages": []}], config.train, seed=0)
    slot.stop()
    assert isinstance(starting.error(), ServerError)
    assert isinstance(waiting.error(), InfrastructureError)
    assert not (tmp_path / "weights").exists()


def test_stop_ends_a_training(config: SweepConfig, base: Weights, tmp_path: Path) -> None:
    slot = slot_of(config, tmp_path, SCRIPTED_TRAIN_S="60")
    training = Call(slot.train, base, [{"messages": []}], config.train, seed=0)
    wait_for("the training", lambda: slot.status().state == "training")
    slot.stop()
    assert isinstance(training.error(), TrainingError)


def test_a_training_that_waited_for_its_like_is_not_repeated(config: SweepConfig, base: Weights, tmp_path: Path) -> None:
    slot = slot_of(config, tmp_path, SCRIPTED_TRAIN_S="2")
    conversations = [{"messages": [{"role": "assistant", "content": "4"}]}]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: slot.train(base, conversations, config.train, seed=0), range(2))
    assert first == second
    assert len(list((tmp_path / "weights").iterdir())) == 1


def test_a_proxy_is_never_asked(config: SweepConfig, base: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    models = LocalModels({base.id: base}, config.server, open_storage(str(tmp_path)))
    engine = ServedEngine(models, FailureLatch(), retries=0, timeout_s=20, max_connections=4)
    assert "wrong" in make_served_lm(base, engine, config.lm)("number 9")[0]
    models.kill(base.id)


def test_without_a_sweep_a_lost_server_is_an_ordinary_error_and_may_come_back(
    config: SweepConfig, base: Weights, tmp_path: Path
) -> None:
    server = config.server.model_copy(update={"env": {"SCRIPTED_START": "die"}})
    models = LocalModels({base.id: base}, server, open_storage(str(tmp_path)))
    lm = make_served_lm(base, ServedEngine(models, None, retries=0, timeout_s=20, max_connections=4), config.lm)
    with pytest.raises(Exception, match="the engine found no memory"):
        lm("number 9")
    del server.env["SCRIPTED_START"]
    assert "wrong" in lm("number 9")[0]
    models.kill(base.id)


def test_each_base_model_of_a_loaded_program_keeps_a_server_of_its_own(
    config: SweepConfig, base: Weights, tmp_path: Path
) -> None:
    write_model(tmp_path / "other", skill=9)
    other = base_weights(str(tmp_path / "other"), {})
    models = LocalModels({base.id: base, other.id: other}, config.server, open_storage(str(tmp_path / "run")))
    engine = ServedEngine(models, None, retries=0, timeout_s=20, max_connections=4)
    lms = [make_served_lm(weights, engine, config.lm) for weights in (base, other)]
    pids = set()
    for number in (7, 8, 9):
        assert ["wrong" in lm(f"number {number}", cache=False)[0] for lm in lms] == [True, number == 9]
        pids.add(tuple(models.server(weights).slot.status().pid for weights in (base, other)))
    assert len(pids) == 1, "none was started twice"
    models.close()


def test_a_server_that_is_being_stopped_is_not_served_from_but_started_anew(
    config: SweepConfig, base: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = slot_of(config, tmp_path)
    first = slot.serve(base)
    stops: list[ChildProcess] = []
    may_end, stop = threading.Event(), ChildProcess.stop

    def stopped_late(process: ChildProcess) -> None:
        stops.append(process)
        assert may_end.wait(30)
        stop(process)

    monkeypatch.setattr(ChildProcess, "stop", stopped_late)
    try:
        stopping = Call(slot.stop)
        wait_for("the stop", lambda: stops)
        serving = Call(slot.serve, base)
        wait_for("its end to be waited for", lambda: len(stops) == 2 or not serving.thread.is_alive())
        may_end.set()
        assert serving.error() is None
        assert stopping.error() is None
        assert slot.change.how == "start"
        assert slot.serve(base) != first
        assert slot.change.how == "kept", "the stop was of the other one"
    finally:
        may_end.set()
        slot.close()


def test_a_server_that_was_killed_is_not_said_to_hang_where_the_news_of_its_end_is_late(
    config: SweepConfig, base: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await_exit = ChildProcess._await_exit

    def await_exit_late(process: ChildProcess) -> None:
        select.select([process._reports], [], [])
        time.sleep(0.5)
        await_exit(process)

    monkeypatch.setattr(ChildProcess, "_await_exit", await_exit_late)
    slot = slot_of(config, tmp_path)
    slot.serve(base)
    pid = slot.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    slot.serve(base)
    assert "ended with status -9" in slot.change.reason
    slot.close()
