"""The files below `cluster/`, and what they run."""

import re
import shlex
import tempfile
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import typer.main
import yaml
from conftest import ROOT

from bt_ray.cli import app
from bt_ray.settings.config import SweepConfig
from bt_ray.settings.toml import load_config
from bt_ray.starter.write import write_starter

CLUSTER = ROOT / "cluster"
COMMAND = re.compile(r"(?<![\w./`-])(?:bt-ray|ray) (?=[a-z])[^`\n|&;>)]*")
PROSE = re.compile(r"^ *# ?\S.*$", re.MULTILINE)
"""A comment that is text; commands in comments are indented further."""
CONTINUED = re.compile(r"\\\n[ #]*")
FOLDED = re.compile(r"(?m)^ *\w+: >-\n(?: {4,}.*\n)+?(?! {4,}\S)")


@dataclass(frozen=True)
class Shipped:
    """A file below `cluster/`.

    Attributes:
        name: Its path there.
        text: Its content, or that of a broken copy.
    """

    name: str
    text: str

    def broken(self, right: str, wrong: str) -> "Shipped":
        """A copy with a mistake in all the places where something is right."""
        assert right in self.text, f"{self.name} has no {right!r}"
        return Shipped(self.name, self.text.replace(right, wrong))

    @cached_property
    def value(self) -> Any:
        return yaml.safe_load(self.text)

    @property
    def commands(self) -> list[list[str]]:
        """Each command of `bt-ray` and `ray` that the file runs or shows, save those in the text of comments."""
        text = re.sub(r"(?m)^( *)# {3}", r"\1", PROSE.sub("", self.text))
        text = CONTINUED.sub("", FOLDED.sub(lambda block: " ".join(block[0].split()[2:]), text))
        return [shlex.split(line.partition(" #")[0]) for line in COMMAND.findall(text)]

    @property
    def sweep(self) -> SweepConfig:
        """The settings of the sweep that the file runs, with the starter's task."""
        (sweep,) = [words[words.index("bt-ray") :] for words in self.commands if "sweep" in words]
        return sweep_settings(sweep)

    @property
    def cluster(self) -> Any:
        """The `RayClusterSpec` of a Kubernetes manifest."""
        spec = self.value["spec"]
        return spec.get("rayClusterSpec", spec)

    @property
    def pods(self) -> list[Any]:
        """The pod specs of a Kubernetes manifest, the head's first."""
        groups = [self.cluster["headGroupSpec"], *self.cluster["workerGroupSpecs"]]
        return [group["template"]["spec"] for group in groups]

    @property
    def workers(self) -> list[Any]:
        """The node types of a `ray up` file, save the head's."""
        return [of for name, of in self.value["available_node_types"].items() if name != self.value["head_node_type"]]


def shipped(name: str) -> Shipped:
    return Shipped(name, (CLUSTER / name).read_text())


def sweep_settings(command: list[str]) -> SweepConfig:
    """What `bt-ray sweep ...` would run, with the starter's file in place of the one that it names."""
    group: Any = typer.main.get_command(app)
    given = group.commands["sweep"].make_context("sweep", command[2:]).params
    with tempfile.TemporaryDirectory() as folder:
        write_starter(Path(folder) / "my")
        overrides = {"run_dir": given["run_dir"], "strategies": given["strategy"] or None}
        return load_config(Path(folder) / "my" / "sweep.toml", overrides, given["assignments"] or ())


def of_ray(words: list[str]) -> None:
    """Raises for a command or an option that Ray does not have."""
    from ray.scripts.scripts import cli

    command: Any = cli
    arguments = words[1:]
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(words[1], arguments)


def of_bt_ray(words: list[str]) -> None:
    """Raises for a command or an option that bt_ray does not have."""
    group: Any = typer.main.get_command(app)
    group.commands[words[1]].make_context(words[1], words[2:])


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def bt_ray_version() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version
