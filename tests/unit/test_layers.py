"""The layers of the design hold: who may import whom, and what importing bt_ray costs."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "bt_ray"

# Each folder, and each module beside them, may import from its own and from those it lists, all of which stand above it.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "location": {"errors"},
    "layout": set(),
    "strategy": {"errors"},
    "weights": {"errors", "layout"},
    "events": set(),
    "models": {"errors", "weights"},
    "step": set(),
    "settings": {"errors", "location", "strategy", "weights"},
    "run_dir": {"errors", "location", "layout", "strategy", "weights", "events", "step", "settings"},
    "task": {"errors", "layout", "strategy", "weights", "step", "settings"},
    "slot": {"errors", "layout", "weights", "models", "settings", "run_dir"},
    "pool": {"errors", "weights", "events", "models", "settings", "run_dir", "slot"},
    "report": {"errors", "layout", "strategy", "weights", "events", "step", "run_dir"},
    "tracking": {"errors", "strategy", "events", "settings", "run_dir", "report"},
    "trial": {
        "errors", "layout", "strategy", "weights", "models", "step", "settings", "run_dir", "task", "slot", "pool",
        "tracking",
    },
    "winner": {"errors", "location", "layout", "weights", "models", "settings", "run_dir", "task", "slot", "trial"},
    "driver": {
        "errors", "layout", "strategy", "weights", "events", "models", "step", "settings", "run_dir", "task",
        "slot", "pool", "tracking", "trial", "winner",
    },
    "starter": {"errors"},
    "cli": {"errors", "settings", "run_dir", "pool", "report", "winner", "driver", "starter"},
    "__init__": {"errors", "settings", "run_dir", "task", "trial", "winner", "driver"},
}  # fmt: skip

RAY_ROOMS = {"pool", "trial", "driver"}
RAY_FILES = {"settings/space.py", "tracking/tune_loggers.py"}
"""Outside of these rooms: they make objects of Ray Tune's."""
IN_A_CHILD = {"slot/arithmetic.py", "slot/serving/engine.py"} | {
    f"slot/training/{name}.py" for name in ("cores", "layers", "main", "trainer")
}
"""They run in a process of their own, with PyTorch."""
DSPY_FREE = ("cli", "pool.server_pool", "report.steps", "report.page", "report.status", "run_dir.prune", "run_dir.examples")
"""What looks at a run directory, and the pool's actor, which every sweep waits for: they are there in a second."""
TORCH_FREE = {"torch", "trl", "peft", "transformers", "datasets", "accelerate"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def dotted(path: Path) -> str:
    return ".".join(("bt_ray", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", modules(), ids=named)
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    part, allowed = part_of(path), LAYERS[part_of(path)]
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "bt_ray":
            imported = rest[0] if rest else "__init__"
            assert imported == part or imported in allowed, f"{part} may not import {name}"
        elif package == "ray":
            assert part in RAY_ROOMS or named(path) in RAY_FILES, f"{part} may not import ray"
        elif package == "vllm":
            assert path.name in {"vllm_main.py", "engine.py"}, "vLLM is a child process"
        elif package in TORCH_FREE:
            assert named(path) in IN_A_CHILD, f"only the training process, and vLLM's, import {package}"


def test_layers_have_no_upward_edge() -> None:
    below: set[str] = set()
    for part, allowed in LAYERS.items():
        assert allowed <= below, f"{part} imports {allowed - below}, which stand above it"
        below.add(part)


def test_there_is_no_utils() -> None:
    assert not [path for path in modules() if path.stem in {"utils", "helpers", "common", "misc"}]


def assert_imports_none_of(names: Iterable[str], heavy: set[str]) -> None:
    code = f"""
import importlib, sys
for name in {[*names]}:
    importlib.import_module(name)
    assert not (found := {heavy} & sys.modules.keys()), (name, found)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_importing_a_lower_layer_loads_no_ray_and_no_torch() -> None:
    not_low = RAY_ROOMS | {"winner", "cli"}
    low = [path for path in modules() if part_of(path) not in not_low and named(path) not in RAY_FILES | IN_A_CHILD]
    assert_imports_none_of(["bt_ray", *map(dotted, low)], {"ray", "vllm"} | TORCH_FREE)


def test_what_looks_at_a_run_directory_loads_no_dspy() -> None:
    assert_imports_none_of([f"bt_ray.{name}" for name in DSPY_FREE], {"dspy", "litellm", "torch"})
