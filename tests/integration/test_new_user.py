"""The path of a new user, from `bt-ray init` to a served winner, in a folder of one's own."""

import json
from pathlib import Path

from typer.testing import CliRunner

from bt_ray.cli import app
from bt_ray.starter.write import write_starter


def test_a_starter_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text("mine")
    told = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert told.exit_code == 2
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.toml"]
    assert (tmp_path / "sweep.toml").read_text() == "mine"


def test_the_starters_data_are_balanced_and_told_apart(tmp_path: Path) -> None:
    write_starter(tmp_path)
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert (len(examples), len({example["review"] for example in examples})) == (64, 64)
    for part in (examples[:24], examples[24:44], examples[44:]):
        assert 0.25 < sum(example["answer"] == "positive" for example in part) / len(part) < 0.75
