"""Whatever is lost while requests are under way, a sweep ends with the result of an undisturbed one, and leaves nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.processes import kill_all, wait_for
from support.scripted_model import write_model
from support.sweep_files import toml
from test_full_disk import IN_A_NAMESPACE
from test_no_orphans import SCORES, RunningSweep

pytestmark = pytest.mark.long


class Faults(RunningSweep):
    """A sweep, and what goes wrong with it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.faults = folder / "faults"
        self.faults.mkdir()
        server = {**settings["server"], "stall_timeout_s": 2}
        server["env"] = {**server["env"], "SCRIPTED_FAULTS": str(self.faults)}
        super().__init__(folder, {**settings, "server": server})

    def events(self, **like: Any) -> list[dict[str, Any]]:
        lines = (self.run_dir.read("events.jsonl") or b"").decode().splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if event.items() >= like.items()]


@pytest.fixture
def sweep(tmp_path: Path, settings: dict[str, Any]) -> Any:
    made = Faults(tmp_path, settings)
    yield made
    kill_all(made.processes.all())
    made.driver.wait()


def api_server_killed(sweep: Faults) -> str:
    kill_all(sweep.processes.running("scripted_server.py"))
    return "ended with status -9"


def port_taken(sweep: Faults) -> str:
    (server, *_) = sweep.processes.running("scripted_server.py")
    (port,) = {it.laddr.port for it in server.net_connections() if it.status == psutil.CONN_LISTEN}
    server.kill()
    stranger = wait_for("the port to be free", lambda: listening_on(port))

    def hang_up() -> None:
        with stranger:
            while True:
                stranger.accept()[0].close()

    threading.Thread(target=hang_up, daemon=True).start()
    return "ended with status -9"


def listening_on(port: int) -> socket.socket | None:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None


def api_server_stopped(sweep: Faults) -> str:
    for process in sweep.processes.running("scripted_server.py"):
        process.send_signal(signal.SIGSTOP)
    return "It hangs"


def model_server_actor_killed(sweep: Faults) -> str:
    sweep.kill("ray::ModelServer")
    return "its actor died"


def pool_actor_killed(sweep: Faults) -> str:
    before = sweep.processes.models()
    sweep.kill("ray::ServerPool")
    wait_for("its servers to be gone", lambda: not any(process.is_running() for process in before))
    return ""


def trial_killed(sweep: Faults) -> str:
    sweep.kill("ray::run_trial", "ray::ImplicitFunc")
    return ""


def errors_for_a_while(sweep: Faults) -> str:
    (sweep.faults / "errors_until").write_text(str(time.time() + 3))
    return ""


def swap_that_fails(sweep: Faults) -> str:
    (sweep.faults / "fail_load").write_text("no memory left")
    return "the reload failed: no memory left"


def swap_to_weights_with_other_labels(sweep: Faults) -> str:
    write_model(sweep.faults / "other", skill=9)
    (sweep.faults / "wrong_load").write_text(str(sweep.faults / "other"))
    return "does not answer as the weights"


def corrupt_weights_file(sweep: Faults) -> str:
    (sweep.faults / "corrupt").write_text("")
    return "is not as its training left it"


@pytest.mark.parametrize(
    "fault",
    [
        api_server_killed,
        port_taken,
        api_server_stopped,
        model_server_actor_killed,
        pool_actor_killed,
        trial_killed,
        errors_for_a_while,
        swap_that_fails,
        swap_to_weights_with_other_labels,
        corrupt_weights_file,
    ],
)
def test_a_fault_costs_no_result_and_leaves_nothing(sweep: Faults, fault: Callable[[Faults], str]) -> None:
    sweep.await_phase("serving")
    reason = fault(sweep)
    assert sweep.await_result() == SCORES
    assert [event for event in sweep.events(kind="server") if reason in event.get("reason", "")]
    assert not [name for name in os.listdir(sweep.faults) if name.endswith(("load", "corrupt"))], "the fault came"
    sweep.assert_nothing_is_left()
    assert not list(Path(os.environ["BT_RAY_CACHE"], "scratch").glob("server-*/tmp/*"))


def test_each_server_starts_once_and_every_lease_ends(sweep: Faults) -> None:
    assert sweep.await_result() == SCORES
    assert len(sweep.events(kind="server", state="serving, start")) == 1
    assert len(sweep.events(kind="server", state="serving, swap")) == 1
    asked = {event["lease"] for event in sweep.events(kind="lease", state="asked")}
    granted = {event["lease"] for event in sweep.events(kind="lease", state="granted")}
    ended = {event["lease"] for event in sweep.events(kind="lease", state="ended")}
    assert len(asked) >= 3
    assert asked == granted
    assert granted - ended == set()


SMALL = """
mount -t tmpfs -o size=1m tmpfs "$WHERE"
cat /dev/zero > "$WHERE/filler" 2> /dev/null || true
status=0; "$PYTHON" -m bt_ray.cli sweep "$TOML" > full.txt 2>&1 || status=$?; echo $status > status.txt
rm "$WHERE/filler"
"$PYTHON" -m bt_ray.cli sweep "$TOML" > again.txt 2>&1
"""


@pytest.mark.parametrize(("where", "status"), [("cache", 1), ("shared memory", 0)])
def test_a_full_disk_or_shared_memory_at_the_start(
    settings: dict[str, Any], tmp_path: Path, where: str, status: int
) -> None:
    if shutil.which("unshare") is None or subprocess.run([*IN_A_NAMESPACE, "true"], check=False).returncode:
        pytest.skip("this system lets nobody but root mount a small disk")
    cache = tmp_path / "cache"
    cache.mkdir()
    server = {**settings["server"], "count": 1, "cpus": 0.5}
    (tmp_path / "sweep.toml").write_text(toml({**settings, "server": server, "strategies": ["p -> w"]}))
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "TOML": str(tmp_path / "sweep.toml"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    env |= {"BT_RAY_CACHE": str(cache), "WHERE": "/dev/shm" if where == "shared memory" else str(cache)}
    done = subprocess.run([*IN_A_NAMESPACE, "bash", "-euc", SMALL], cwd=tmp_path, env=env, check=False)
    full, again = ((tmp_path / name).read_text() for name in ("full.txt", "again.txt"))
    assert (tmp_path / "status.txt").read_text() == f"{status}\n", full
    assert "Traceback" not in full
    if status:
        assert "No space left on device" in full
    assert done.returncode == 0, again
    assert '"p -> w", 70.0 % on the valset' in again
