"""The code in the pages works: Python runs, tasks pass the check, settings are accepted, commands and options exist."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import dspy
import pytest
import typer.main
from conftest import ROOT
from test_docs import PAGES
from typer.testing import CliRunner

import bt_ray
from bt_ray.cli import app
from bt_ray.driver.check import check_sweep
from bt_ray.settings.config import make_config
from bt_ray.starter.write import write_starter

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\bbt-ray (?=[a-z])([^`\n|]*)")
RAY_COMMAND = re.compile(r"^ray .+", re.MULTILINE)
NEEDED = {"task": "task.py:build", "model": "org/model", "strategies": ["p"]}
KINDS = {"", "python", "toml"}
LEFT_OUT = "[...]"
"""In a task that stands for one with data."""


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


def ray_commands() -> Iterator[Any]:
    for page in PAGES:
        for number, line in enumerate(RAY_COMMAND.findall("".join(code for _, code in FENCE.findall(page.read_text())))):
            yield pytest.param(line, id=f"{page.name}-{number}")


def whole_tasks() -> Iterator[Any]:
    return (block for block in blocks("python") if "def build(" in block.values[0] and LEFT_OUT not in block.values[0])


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table of a page whose first row begins with `heading`, each as its cells."""
    below = (ROOT / "docs" / page).read_text().partition(f"\n{heading}")[2].partition("\n\n")[0]
    return [[cell.strip(" `") for cell in row.strip("|").split(" | ")] for row in below.splitlines()[2:]]


def test_there_are_blocks_of_each_kind() -> None:
    found = ((blocks("python"), 6), (whole_tasks(), 3), (blocks("toml"), 8), (commands(), 8), (ray_commands(), 5))
    assert all(len(list(these)) >= least for these, least in found)


def test_no_block_is_of_a_kind_that_nothing_checks() -> None:
    assert {kind for page in PAGES for kind, _ in FENCE.findall(page.read_text())} <= KINDS


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bt_ray, "load", create_autospec(bt_ray.load))
    names: dict[str, Any] = {}
    exec(compile(code, "block", "exec"), names)
    if "build" in names and LEFT_OUT in code:
        task = names["build"]()
        context = bt_ray.StepContext("p", 0, tmp_path, dspy.LM("openai/unused", api_key="none"))
        assert task.build_optimizers(context).keys() == {"p", "w"}


@pytest.mark.parametrize("code", whole_tasks())
def test_a_whole_task_passes_the_check_and_its_metric_accepts_its_labels(code: str, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(code)
    values = {**NEEDED, "task": f"{tmp_path}/task.py:build", "strategies": "all(max_length = 2)"}
    task = check_sweep(make_config(values), None).first.task
    for example in task.trainset:
        value = task.metric(example, dspy.Prediction(**example.toDict()))
        assert value.score if isinstance(value, dspy.Prediction) else value


@pytest.mark.parametrize(("heading", "kind"), [("| field |", bt_ray.Task), ("| `ctx.` |", bt_ray.StepContext)])
def test_the_tables_of_fields_have_all_of_them_and_no_other(heading: str, kind: type) -> None:
    rows = table("tasks.md", heading)
    assert [row[0] for row in rows] == [field.name for field in fields(kind)]
    if kind is bt_ray.Task:
        assert [row[1] for row in rows] == [shown_default(field) for field in fields(kind)]


def shown_default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    return "required" if field.default is MISSING else repr(field.default)


def test_the_tree_of_steps_is_what_plan_prints(tmp_path: Path) -> None:
    figures = FENCE.findall((ROOT / "docs" / "concepts.md").read_text())
    (figure,) = (code for _, code in figures if code.startswith("baseline"))
    write_starter(tmp_path / "my")
    options = ["--set", "model=org/model", "--run-dir", str(tmp_path / "run")]
    planned = CliRunner().invoke(app, ["plan", str(tmp_path / "my" / "sweep.toml"), *options])
    count = figure.splitlines()[-1]
    assert count in planned.output.splitlines()
    assert branches(figure.partition(count)[0]) == branches(planned.output.partition(count)[0])


def branches(tree: str) -> set[tuple[str, ...]]:
    """The way to each step of a tree, in whatever order it shows them."""
    ways: list[tuple[str, ...]] = []
    for line in tree.splitlines():
        name = line.lstrip("│├└─ ")
        depth = (len(line) - len(name)) // 4
        above = next((way for way in reversed(ways) if len(way) == depth), ())
        ways.append((*above, name))
    return set(ways)


@pytest.mark.parametrize("code", blocks("toml"))
def test_settings_are_accepted(code: str) -> None:
    assert make_config({**NEEDED, **tomllib.loads(code)})


@pytest.mark.parametrize("line", commands())
def test_commands_and_their_options_exist(line: str) -> None:
    name, *arguments = shlex.split(line.partition("#")[0].split(";")[0])
    group: Any = typer.main.get_command(app)
    group.commands[name].make_context(name, arguments)  # raises for what it does not know


@pytest.mark.parametrize("line", ray_commands())
def test_commands_of_ray_and_their_options_exist(line: str) -> None:
    from ray.scripts.scripts import cli

    command: Any = cli
    _, *arguments = shlex.split(line.partition(" #")[0])
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(line, arguments)
