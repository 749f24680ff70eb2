"""What a run directory says of its sweep, while it runs, when it was killed, and after its end."""

import json
import signal
import time
from pathlib import Path
from typing import Any

from support.processes import wait_for
from test_no_orphans import SCORES, RunningSweep
from typer.testing import CliRunner

from bt_ray.cli import app
from bt_ray.layout import STATUS
from bt_ray.report.state import SILENT, headline
from bt_ray.report.status import read_status
from bt_ray.run_dir.status_file import SweepState
from bt_ray.run_dir.storage import Storage, open_storage


def said(run_dir: str, *options: str) -> str:
    told = CliRunner().invoke(app, ["status", run_dir, *options], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    return told.output


def training_lines(text: str) -> list[str]:
    """The lines of a status that tells of a training; none of another's."""
    return text.splitlines() if " training " in text else []


def test_a_sweep_can_be_followed_from_anywhere(tmp_path: Path, settings: dict[str, Any]) -> None:
    run_dir = settings["run_dir"]
    running = RunningSweep(tmp_path, settings)
    running.await_phase("training")
    lines = wait_for("its status", lambda: training_lines(said(run_dir)))
    assert lines[0].startswith("running for ")
    assert lines[1].startswith("2 of 3 steps are finished, the baseline included; 2 in this run, ")
    assert any(line.split()[:3] == ["p", "->", "w"] and "step p -> w" in line for line in lines)
    assert json.loads(said(run_dir, "--json"))["steps"] == 3

    assert running.await_result() == SCORES
    assert said(run_dir).startswith("ended ")
    assert "3 of 3 steps are finished" in said(run_dir)
    assert "done" in said(run_dir)


def test_a_sweep_that_was_killed_is_told_from_one_that_runs(tmp_path: Path, settings: dict[str, Any]) -> None:
    running = RunningSweep(tmp_path, settings)
    running.await_phase("serving")
    running.driver.send_signal(signal.SIGKILL)
    running.driver.wait()
    state = read_status(open_storage(settings["run_dir"])).state
    assert headline(state, state.at + 1).startswith("running for")
    assert headline(state, state.at + SILENT + 1).startswith("No update for")
    assert "Run the same command to resume." in headline(state, time.time() + 1000)


def test_who_waits_for_a_server_is_told_with_the_reason(storage: Storage) -> None:
    now = time.time()
    storage.write_json("sweep.json", {"steps": {"": {"prefix": "", "key": "k", "parent": "", "parts": {}, "trains": False}}})
    needs = "needs 2 GPUs and 1 CPU on one node"
    servers = [{"server": 0, "state": "placing", "weights_id": None, "holder": "", "detail": needs}]
    storage.write_json(STATUS, {**SweepState(started=now - 100).to_json(), "servers": servers})
    leases = [
        {"kind": "lease", "at": now - 200, "lease": 0, "state": "asked", "holder": "trial of an earlier run"},
        {"kind": "lease", "at": now - 90, "lease": 1, "state": "asked", "holder": "trial p"},
        {"kind": "lease", "at": now - 80, "lease": 1, "state": "granted", "holder": "trial p"},
        {"kind": "lease", "at": now - 60, "lease": 2, "state": "asked", "holder": "trial w"},
        {"kind": "lease", "at": now - 50, "lease": 3, "state": "asked", "holder": "trial x"},
        {"kind": "lease", "at": now - 40, "lease": None, "state": "holder died", "holder": "trial x"},
    ]
    storage.write("events.jsonl", "".join(json.dumps(event) + "\n" for event in leases).encode())
    lines = read_status(storage).lines
    assert lines[0] == "0 of 1 steps are finished, the baseline included"
    assert lines[1].startswith("trial w has waited 6")
    assert lines[1].endswith(f" s for a server: a new one waits for room: {needs}")
    assert len(lines) == 2


def test_a_folder_without_a_sweep_is_told(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert told.exit_code == 2
    assert "is no run directory of a sweep" in told.output
