"""However a sweep ends, no model process is left; and a trial or server that is killed costs no result."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import MarkedProcesses, kill_all, wait_for
from support.sweep_files import toml

from bt_ray.run_dir.storage import open_storage

SCORES = {"": 20.0, "p": 40.0, "p -> w": 70.0}


class RunningSweep:
    """`bt-ray sweep` in a process of its own, with a Ray of its own, slow enough to be disturbed.

    Its training goes on until its result is waited for.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._hold = folder / "hold"
        self._hold.write_text("0")
        env = {**settings["server"]["env"], "SCRIPTED_DELAY_S": "0.3", "SCRIPTED_TRAIN_HOLD": str(self._hold)}
        server = {**settings["server"], "count": 1, "cpus": 0.5, "env": env}
        values = {**settings, "strategies": ["p -> w"], "server": server}
        (folder / "sweep.toml").write_text(toml(values))
        self.run_dir = open_storage(settings["run_dir"])
        self.folder = folder
        self.processes = MarkedProcesses()
        self.output = folder / "output.txt"
        command = [sys.executable, "-m", "bt_ray.cli", "sweep", str(folder / "sweep.toml")]
        with self.output.open("w") as output:
            self.driver = subprocess.Popen(command, stdout=output, stderr=output, env=self.processes.environment)

    def await_phase(self, phase: str) -> None:
        if phase == "serving":
            requests = self.folder / "requests.jsonl"
            wait_for("requests", lambda: requests.exists() and len(requests.read_text().splitlines()) >= 4)
        else:
            wait_for("a training", lambda: self.processes.running("scripted_trainer.py"))
        assert self.processes.models()

    def kill(self, *names: str) -> None:
        """SIGKILL the one process with this in its command line."""
        (process,) = wait_for(f"one process of {names}", lambda: self.processes.named(*names))
        process.kill()

    def let_training_end(self) -> None:
        self._hold.unlink(missing_ok=True)

    def await_result(self) -> dict[str, float]:
        """The score of each step, when the sweep has ended by itself."""
        self.let_training_end()
        assert self.driver.wait() == 0, self.output.read_text()
        result = self.run_dir.read_json("result.json")
        assert [trial["error"] for trial in result["trials"]] == [None]
        assert result["test_score"] == 70.0
        return {candidate["prefix"]: candidate["score"] for candidate in result["trials"][0]["candidates"]}

    def assert_nothing_is_left(self) -> None:
        wait_for("all model processes to be gone", lambda: not self.processes.models())
        wait_for("all other processes to be gone", lambda: not self.processes.all())


@pytest.fixture
def running(tmp_path: Path, settings: dict[str, Any]) -> Any:
    sweep = RunningSweep(tmp_path, settings)
    yield sweep
    kill_all(sweep.processes.all())
    sweep.driver.wait()


# SIGKILL: test_resume.py
@pytest.mark.parametrize(
    ("how", "phase"), [(signal.SIGINT, "serving"), (signal.SIGINT, "training"), (signal.SIGTERM, "training")]
)
def test_the_drivers_end_is_the_end_of_all(running: RunningSweep, phase: str, how: signal.Signals) -> None:
    running.await_phase(phase)
    running.driver.send_signal(how)
    running.driver.wait()
    if how == signal.SIGINT:
        assert running.driver.returncode == 130
        assert "error: Interrupted." in running.output.read_text()
    running.assert_nothing_is_left()


def test_a_killed_test_of_the_winner_is_run_again(running: RunningSweep) -> None:
    running.let_training_end()
    running.kill("ray::TestEvaluation.score")
    assert running.await_result() == SCORES
    running.assert_nothing_is_left()


def test_a_raylet_that_is_killed_leaves_nothing(running: RunningSweep) -> None:
    running.await_phase("serving")
    running.kill("raylet/raylet")
    wait_for("all model processes to be gone", lambda: not running.processes.models())
