"""The winner at work: served to others, and exported for those who have no bt_ray."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import openai
import pytest
from conftest import MARK, scripted_sweep
from support.processes import MarkedProcesses, wait_for
from support.scripted_model import read_skill
from typer.testing import CliRunner

import bt_ray
from bt_ray.cli import app
from bt_ray.winner.export import export
from bt_ray.winner.load import find_best
from bt_ray.winner.serve import ServedBest

NUMBERS = (26, 27)
ANSWERS = ["52", "wrong"]
"""Of the winner, which has skill 5 and two demos."""


@pytest.fixture(scope="module")
def run_dir(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = scripted_sweep(tmp_path_factory.mktemp("winner"))
    settings["server"]["env"] = {}
    bt_ray.sweep(settings["task"], {**settings, "strategies": ["w -> p"]})
    return Path(settings["run_dir"])


@dataclass(frozen=True)
class Serving:
    """A `bt-ray serve` that has said where it serves."""

    processes: MarkedProcesses
    address: str
    model: str
    token: str

    def ask(self, number: int, token: str | None = None) -> str:
        """An answer of the model, to a prompt without the program's demos."""
        with openai.OpenAI(base_url=self.address, api_key=token or self.token, max_retries=0) as client:
            prompt = [{"role": "system", "content": "Your output fields are:\n1. `answer` (str)"}]
            prompt += [{"role": "user", "content": f"number {number}"}]
            answer = client.chat.completions.create(model=self.model, messages=prompt)  # type: ignore[arg-type]
            return re.findall(r"## answer ## \]\]\n(\w+)", answer.choices[0].message.content or "")[0]


@pytest.fixture(scope="module")
def served(run_dir: Path) -> Iterator[Serving]:
    """`bt-ray serve`, until Ctrl-C, which leaves nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = run_dir.with_name("serve.txt")
    processes = MarkedProcesses()
    command = [sys.executable, "-m", "bt_ray.cli", "serve", str(run_dir), "--port", str(port)]
    with output.open("w") as opened:
        process = subprocess.Popen(
            command, stdout=opened, stderr=subprocess.STDOUT, env={**processes.environment, "PYTHONUNBUFFERED": "1"}
        )
    try:
        wait_for("the address", lambda: "print(program" in output.read_text() or process.poll() is not None)
        said = dict(re.findall(r"^(model|address|token) +(\S+)$", output.read_text(), re.MULTILINE))
        yield Serving(processes, said["address"], said["model"], said["token"])
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    wait_for("its processes to be gone", lambda: not processes.all())


def test_the_winner_is_served_to_whoever_has_the_token(run_dir: Path, served: Serving) -> None:
    assert [served.ask(number) for number in (24, 25)] == ["48", "wrong"], "skill 5"
    with pytest.raises(openai.AuthenticationError):
        served.ask(24, token="another")
    assert served.model == next(iter(find_best(run_dir).weights))


def test_a_program_asks_a_server_that_somebody_else_runs_and_that_is_kept_up(run_dir: Path, served: Serving) -> None:
    program = bt_ray.load(run_dir, served_at=served.address, token=served.token)
    assert [program(question=f"number {number}").answer for number in NUMBERS] == ANSWERS
    with pytest.raises(bt_ray.BtRayError, match="takes this token"):
        bt_ray.load(run_dir, served_at=served.address, token="another")

    (server,) = served.processes.running("scripted_server.py")
    server.kill()
    program.lm.cache = False
    assert program(question="number 26").answer == "52", "the server is started again at the same address"


def test_a_port_that_is_taken_is_told_before_anything_starts(run_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = CliRunner().invoke(app, ["serve", str(run_dir), "--port", str(taken.getsockname()[1])])
    assert told.exit_code == 2
    assert "cannot be listened on (Address already in use). Name another" in told.output


LOADED_WITHOUT_BT_RAY = """
import json, sys
sys.modules["bt_ray"] = None  # importing it fails
import dspy

class Double(dspy.Signature):
    '''Double the number.'''
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()

folder, address, model, token = sys.argv[1:]
program = dspy.Predict(Double)
program.load(folder + "/program.json")
program.set_lm(dspy.LM("openai/" + model, api_base=address, api_key=token, temperature=0, max_tokens=1024))
print(json.dumps([program(question=f"number {number}").answer for number in (26, 27)]))
"""


def test_the_export_answers_without_bt_ray_as_the_winner_does(run_dir: Path, served: Serving, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["export", str(run_dir), "--to", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    folder = tmp_path / "out"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in manifest["files"]} == manifest[
        "files"
    ]
    held = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert held == {*manifest["files"], "manifest.json", "README.md"}
    assert (manifest["strategy"], manifest["score"], manifest["test_score"]) == ("w -> p", 70.0, 70.0)
    assert list(manifest["depends_on"]) == ["w -> p", "w", "baseline"]
    assert "trainset" in str(manifest["depends_on"])
    assert read_skill(folder / "model") == 5
    assert not list(folder.rglob("bt_ray_weights.json"))
    card = (folder / "README.md").read_text()
    assert "| `w -> p` |" in card
    assert "70.0 % of 20 examples" in card

    command = [sys.executable, "-c", LOADED_WITHOUT_BT_RAY, str(folder), served.address, served.model, served.token]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout.splitlines()[-1]) == ANSWERS


def test_each_candidate_can_be_opened_by_its_name_and_from_the_result(run_dir: Path) -> None:
    result = bt_ray.SweepResult.read(run_dir / "result.json")
    assert [candidate.name for candidate in result.candidates] == ["w -> p", "w", "baseline"]
    programs = [candidate.load() for candidate in result.candidates]
    programs += [bt_ray.load(run_dir / "best", candidate=name) for name in ("w", "baseline")]
    programs.append(bt_ray.load(run_dir, candidate=result.candidates[1]))
    right = [[bool(program(question=f"number {n}").answer == str(2 * n)) for n in (31, 34, 36)] for program in programs]
    best, tuned, baseline = [True, True, True], [True, True, False], [True, False, False]
    assert right == [best, tuned, baseline, tuned, baseline, tuned], "skills 5 with two demos, 5, and 2"

    ensemble = dspy.Ensemble(reduce_fn=dspy.majority).compile(programs[:3])
    assert ensemble(question="number 34").answer == "68"
    assert len(MarkedProcesses(os.environ[MARK]).running("scripted_server.py")) == 1, "one server for all of them"
    programs[0].lm.kill()


def test_a_candidate_that_is_not_there_is_told_with_those_that_are(run_dir: Path) -> None:
    with pytest.raises(bt_ray.BtRayError) as caught:
        bt_ray.load(run_dir, candidate="w -> q")
    assert f"{run_dir} has no candidate \"w -> q\". Did you mean 'w -> p'?" in str(caught.value)
    assert str(caught.value).endswith('Its candidates: "baseline", "w", "w -> p".')
    for command in (["serve", str(run_dir)], ["export", str(run_dir), "--to", str(run_dir / "out")]):
        told = CliRunner().invoke(app, [*command, "--candidate", "p"])
        assert told.exit_code == 2
        assert "Its candidates:" in told.output


def test_a_candidate_is_exported_with_its_own_score(run_dir: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["export", str(run_dir), "--to", str(tmp_path / "out"), "--candidate", "w"])
    assert told.exit_code == 0, told.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["prefix"], manifest["score"], manifest.get("test_score")) == ("w", 50.0, None)
    assert "| score on the valset | 50.0 % of 20 examples |" in (tmp_path / "out" / "README.md").read_text()
    assert read_skill(tmp_path / "out" / "model") == 5


def test_a_candidate_is_served(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def keep_up(served: ServedBest, tell: Any) -> None:
        seen.extend(endpoint.weights_id for endpoint in served.endpoints)

    monkeypatch.setattr(ServedBest, "keep_up", keep_up)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = CliRunner().invoke(app, ["serve", str(run_dir), "--candidate", "baseline", "--port", port])
    assert told.exit_code == 0, told.output
    assert seen == list(bt_ray.SweepResult.read(run_dir / "result.json").candidates[-1].weights.values())
    assert f'bt_ray.load("{run_dir}", candidate="baseline", served_at=' in told.output


def test_a_candidate_whose_weights_were_pruned_is_told_by_name(run_dir: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run_dir, tmp_path / "moved"))
    (weights,) = (moved / "weights").iterdir()
    shutil.rmtree(weights)
    with pytest.raises(bt_ray.BtRayError, match=r'The weights of candidate "w" were removed, by `bt-ray prune`'):
        bt_ray.SweepResult.read(moved / "result.json").candidates[1].load()
    program = bt_ray.load(moved, candidate="baseline")
    assert program(question="number 21").answer == "42"
    program.lm.kill()


def test_an_export_overwrites_nothing_and_is_whole_or_not_there(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(bt_ray.BtRayError, match="is there already"):
        export(run_dir, tmp_path)
    with pytest.raises(bt_ray.BtRayError, match="neither a run directory with a best program"):
        export(tmp_path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
