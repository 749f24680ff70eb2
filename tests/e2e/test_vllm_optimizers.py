"""DSPy's GEPA and MIPROv2 on real vLLM, with a tiny model that the test makes: what it says seldom parses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT
from support.running_api import running_api

import bt_ray

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.usefixtures("local_ray")
def test_mipro_and_gepa_optimize_a_program_of_a_served_model(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SUPPORT / "tiny_model.py"), str(tmp_path / "tiny"), "16384"], check=True)
    settings = {
        "model": str(tmp_path / "tiny"),
        "strategies": ["mipro", "gepa"],
        "run_dir": str(tmp_path / "run"),
        "num_threads": 4,
        "max_errors": 1000,
        "lm": {"max_tokens": 48},
        "server": {"threads": 2, "max_model_len": 12288, "max_num_seqs": 8},
    }
    with running_api(tmp_path, "said_better.py", "said.py") as api:
        result = bt_ray.sweep(f"{api.tasks}:prompted", settings)

    assert [trial.error for trial in result.trials] == [None, None]
    assert [[candidate.prefix for candidate in trial.candidates] for trial in result.trials] == [["", "mipro"], ["", "gepa"]]
    assert {request["question"] for request in api.log()} == {None}, "the API proposed for MIPROv2, and did nothing else"
    steps = {step["prefix"]: step for step in map(read, (tmp_path / "run" / "steps").glob("*/*.json"))}
    assert set(steps) == {"", "mipro", "gepa"}
    assert min(step["requests"] for step in steps.values()) > 0
    length = {prefix: step["prompt_tokens"] / step["requests"] for prefix, step in steps.items()}
    assert length["gepa"] > 2 * length["mipro"], "the served model was asked to reflect, in long prompts"
    events = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    started = [event for event in events if event["kind"] == "server" and event.get("state", "").startswith("serving")]
    assert len(started) == 1, "one server answered all of it"


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))
