"""A sweep on real vLLM that loses its server's processes, one kind after the other, while requests are under way."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import SUPPORT
from support.processes import MarkedProcesses, kill_all, wait_for
from support.sweep_files import toml

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


class Sweep:
    """`bt-ray sweep` on a tiny model, whose engine is a process of its own beside its API server."""

    def __init__(self, folder: Path) -> None:
        self.processes = MarkedProcesses()
        self.run_dir = folder / "run"
        self._hold = folder / "hold"
        for file in ("said.py", "said_while_held.py"):
            shutil.copy(SUPPORT / file, folder)
        subprocess.run([sys.executable, str(SUPPORT / "tiny_model.py"), str(folder / "tiny")], check=True)
        values = {
            "task": f"{folder / 'said_while_held.py'}:build",
            "model": str(folder / "tiny"),
            "strategies": ["w"],
            "run_dir": str(self.run_dir),
            "num_threads": 4,
            "max_errors": 1000,
            "lm": {"max_tokens": 48},
            "server": {"threads": 2, "cpus": 0.5, "max_model_len": 1536, "max_num_seqs": 8, "stall_timeout_s": 20},
            "train": {"method": "full", "epochs": 15, "learning_rate": 3e-3, "batch_size": 4},
        }
        (folder / "sweep.toml").write_text(toml(values))
        self.output = folder / "output.txt"
        command = [sys.executable, "-m", "bt_ray.cli", "sweep", str(folder / "sweep.toml")]
        with self.output.open("w") as output:
            self.driver = subprocess.Popen(command, stdout=output, stderr=output, env=self.processes.environment)

    def hold(self) -> None:
        """The next evaluation goes on until `release`."""
        self._hold.touch()

    def release(self) -> None:
        self._hold.unlink()

    def await_requests(self) -> None:
        """Return while a server answers requests."""

        def under_way() -> bool:
            for process in self.processes.named("bt_ray.slot.serving.vllm_main"):
                try:
                    token = process.environ()["BT_RAY_SERVER_TOKEN"]
                    ports = [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                    url = f"http://127.0.0.1:{ports[0]}/bt_ray/status"
                    status = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=5).json()
                    if status["in_flight"] > 0:
                        return True
                except (psutil.Error, httpx.HTTPError, KeyError, IndexError):
                    continue
            assert self.driver.poll() is None, self.output.read_text()
            return False

        wait_for("requests under way", under_way)

    def kill(self, name: str) -> None:
        """Kill the processes of this name while requests are under way, and wait for the end of what they leave."""
        self.await_requests()
        models = self.processes.models()
        kill_all([p for p in self.processes.named(name) if "keeper.py" not in " ".join(p.cmdline())])
        wait_for(f"the end of what {name} leaves", lambda: not any(p.is_running() for p in models))

    def result(self) -> dict[str, float]:
        assert self.driver.wait(400) == 0, self.output.read_text()
        result = json.loads((self.run_dir / "result.json").read_text())
        assert [trial["error"] for trial in result["trials"]] == [None]
        return {candidate["prefix"]: candidate["score"] for candidate in result["trials"][0]["candidates"]}

    def events(self, **like: Any) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]
        return [event for event in events if event.items() >= like.items()]


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    started = Sweep(tmp_path)
    yield started
    kill_all(started.processes.all())
    started.driver.wait()


def test_a_sweep_survives_the_death_of_each_of_its_servers_processes(sweep: Sweep) -> None:
    sweep.hold()
    sweep.kill("bt_ray.slot.serving.vllm_main")
    sweep.release()
    wait_for("the training", lambda: sweep.processes.named("bt_ray.slot.training.main"))
    sweep.hold()
    sweep.kill("VLLM::EngineCore")
    sweep.kill("ray::ModelServer")
    sweep.release()
    assert sweep.result() == {"": 0.0, "w": 100.0}, "as of an undisturbed sweep"
    assert len(sweep.events(kind="server", state="serving, start")) == 4
    wait_for("all processes to be gone", lambda: not sweep.processes.all())
    left = [file.name for file in Path("/dev/shm").iterdir() if file.stat().st_ctime > sweep.run_dir.stat().st_ctime]
    assert not [name for name in left if name.startswith(("psm_", "sem.loky"))]
