"""The code in the pages works: Python runs, settings are accepted, commands and their options exist."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import dspy
import pytest
import typer.main
from test_docs import PAGES

import bt_ray
from bt_ray.cli import app
from bt_ray.config import make_config

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\bbt-ray (?=[a-z])([^`\n|]*)")
NEEDED = {"task": "task.py:build", "model": "org/model", "strategies": ["p"]}


def blocks(language: str) -> Iterator[Any]:
    for page in PAGES:
        for number, (named, code) in enumerate(FENCE.findall(page.read_text())):
            if named == language:
                yield pytest.param(code, id=f"{page.name}-{number}")


def commands() -> Iterator[Any]:
    """Every mention of a command with arguments, in blocks and in running text."""
    for page in PAGES:
        text = re.sub(r"\\\n", " ", page.read_text())
        for number, line in enumerate(COMMAND.findall(text)):
            if len(line.split()) > 1:
                yield pytest.param(line, id=f"{page.name}-{number}")


def test_there_are_blocks_of_each_kind() -> None:
    assert all(len(list(found)) >= least for found, least in ((blocks("python"), 2), (blocks("toml"), 3), (commands(), 8)))


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bt_ray, "load", create_autospec(bt_ray.load))
    names: dict[str, Any] = {}
    exec(compile(code, "block", "exec"), names)
    if "build" in names:
        task = names["build"]()
        context = bt_ray.StepContext("p", 0, tmp_path, dspy.LM("openai/unused", api_key="none"))
        assert task.build_optimizers(context).keys() == {"p", "w"}


@pytest.mark.parametrize("code", blocks("toml"))
def test_settings_are_accepted(code: str) -> None:
    assert make_config({**NEEDED, **tomllib.loads(code)})


@pytest.mark.parametrize("line", commands())
def test_commands_and_their_options_exist(line: str) -> None:
    name, *arguments = shlex.split(line.partition("#")[0].split(";")[0])
    group: Any = typer.main.get_command(app)
    group.commands[name].make_context(name, arguments)  # raises for what it does not know
