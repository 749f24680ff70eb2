"""One driver at a time holds a run directory, whatever it lies on."""

import subprocess
import sys
import time

import pytest

from bt_ray.errors import ConfigError, StorageError
from bt_ray.layout import LOCK
from bt_ray.run_dir import lock as run_lock
from bt_ray.run_dir.lock import held
from bt_ray.run_dir.storage import Storage

HOLD = """
import sys, time
from bt_ray.run_dir.lock import held
from bt_ray.run_dir.storage import open_storage
with held(open_storage(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    monkeypatch.setattr(run_lock, "DEAD_AFTER_S", 3.0)
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.1)


def test_drivers_are_counted(storage: Storage) -> None:
    for number in (1, 2, 3):
        with held(storage) as drivers:
            assert drivers == number


def test_a_second_driver_is_refused(storage: Storage) -> None:
    with held(storage):
        time.sleep(0.5)
        with pytest.raises(ConfigError, match="another sweep is running"), held(storage):
            pass
    with held(storage) as drivers:
        assert drivers == 2


@pytest.mark.parametrize("where", ["this machine", "another"])
def test_one_that_was_killed_holds_it_no_longer(storage: Storage, where: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, storage.location], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    if where == "another" and storage.folder is None:
        found = storage.read_json(LOCK)
        storage.write_json(LOCK, {**found, "process": {**found["process"], "where": "another boot, another machine"}})
    told: list[str] = []
    with held(storage, told.append) as drivers:
        assert drivers == 2
    waited = where == "another" and storage.folder is None
    assert bool(told) == waited, "only another machine's holder may be alive without writing"


def test_a_driver_that_was_taken_over_stops(storage: Storage) -> None:
    if storage.folder is not None:
        pytest.skip("the operating system's lock cannot be taken over")

    def take_over() -> None:
        storage.write_json(LOCK, {"held": True, "name": "another", "drivers": 2, "beat": 0})
        time.sleep(10)

    with pytest.raises(StorageError, match="taken over by another driver"), held(storage):
        take_over()
    found = storage.read_json(LOCK)
    assert found["name"] == "another", "it is left to who holds it now"
