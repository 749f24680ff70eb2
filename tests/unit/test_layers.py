"""The layers of the design hold: who may import whom, and what importing bt_ray costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "bt_ray"

# Each module may import from its own layer's earlier modules and from lower layers, as listed: nothing else.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "strategy": {"errors"},
    "weights": {"errors"},
    "events": set(),
    "storage": {"errors"},
    "state": {"errors", "events", "storage", "strategy"},
    "event_log": {"errors", "events", "storage"},
    "placement_state": {"weights"},
    "placement": {"placement_state", "weights"},
    "config": {"errors", "storage", "weights"},
    "resources": {"config", "errors"},
    "sweep_toml": {"config", "errors"},
    "results": {"errors", "storage", "strategy"},
    "comparison": {"results"},
    "run_lock": {"errors", "storage"},
    "node_disk": {"errors", "storage"},
    "child": {"errors"},
    "arithmetic": {"child", "errors", "node_disk"},
    "node_weights": {"errors", "node_disk", "storage", "weights"},
    "store": {"errors", "results", "storage", "weights"},
    "metric": set(),
    "task": {"errors", "metric"},
    "fingerprint": {"config", "strategy", "task", "weights"},
    "space": {"config", "errors", "results"},
    "search": {"strategy"},
    "search_walk": {"config", "results", "search", "store", "strategy"},
    "kept_examples": {"fingerprint", "storage"},
    "plan": {"fingerprint", "store", "strategy"},
    "run_directory": {"config", "state", "errors", "fingerprint", "storage", "store", "strategy"},
    "teachers": {"errors"},
    "serving": {"arithmetic", "child", "config", "errors", "weights"},
    "training": {"arithmetic", "child", "config", "errors", "serving", "weights"},
    "known_answers": {"errors", "serving", "storage", "weights"},
    "trainings": {"errors", "node_weights", "storage", "training", "weights"},
    "slot": {
        "child", "config", "errors", "known_answers", "node_disk", "node_weights", "serving", "storage", "training",
        "trainings", "weights",
    },
    "failures": {"errors"},
    "failure_latch": {"errors", "failures"},
    "hosting": {"errors", "serving", "weights"},
    "one_core": set(),
    "lm": {"config", "errors", "failure_latch", "failures", "hosting", "serving", "weights"},
    "local_models": {"config", "errors", "hosting", "serving", "slot", "storage", "weights"},
    "evaluation": {"errors", "failure_latch", "failures", "results"},
    "better_together": {"errors", "evaluation", "lm", "results", "strategy", "task", "teachers"},
    "served_models": {"config", "errors", "lm", "sweep_toml", "weights"},
    "kept_steps": {
        "better_together", "errors", "failures", "fingerprint", "lm", "results", "served_models", "store", "weights",
    },
    "remote_models": {"errors", "hosting", "serving", "weights"},
    "best": {
        "config", "errors", "hosting", "kept_steps", "lm", "local_models", "node_disk", "remote_models", "results",
        "served_models", "storage", "store", "task", "weights",
    },
    "report": {
        "comparison", "event_log", "events", "fingerprint", "kept_examples", "plan", "results", "run_directory", "state",
        "storage", "store", "strategy", "trainings", "weights",
    },
    "mlflow_runs": {"config", "errors", "events", "fingerprint", "report", "results", "storage", "strategy"},
    "tune_loggers": {"config"},
    "served_best": {"best", "child", "errors", "serving", "slot", "weights"},
    "export": {"best", "errors", "node_disk", "node_weights", "results", "run_directory", "weights"},
    "prune": {"best", "errors", "run_directory", "storage", "training", "trainings", "weights"},
    "preflight": {
        "config", "errors", "failure_latch", "fingerprint", "hosting", "lm", "resources", "run_directory", "served_models",
        "space", "strategy", "task", "training", "weights",
    },
    "cpu_cost": {"arithmetic", "config", "errors", "serving", "task", "weights"},
    "nodes": {"config", "resources"},
    "claims": {"results"},
    "actors": {
        "claims", "config", "errors", "events", "hosting", "placement_state", "nodes", "placement", "resources", "results",
        "serving", "slot", "storage", "training", "weights",
    },
    "trial_setup": {
        "actors", "config", "errors", "failure_latch", "fingerprint", "hosting", "lm", "node_disk", "one_core",
        "served_models", "storage", "store", "task",
    },
    "spread_evaluation": {
        "actors", "errors", "evaluation", "kept_steps", "lm", "served_models", "trial_setup", "weights",
    },
    "trial": {
        "actors", "better_together", "errors", "evaluation", "failures", "kept_steps", "lm", "mlflow_runs", "results",
        "served_models", "spread_evaluation", "store", "strategy", "trial_setup",
    },
    "cluster": {
        "actors", "config", "errors", "event_log", "events", "placement_state", "nodes", "preflight", "storage", "weights",
    },
    "tuning": {"errors", "events", "node_disk", "search_walk", "strategy", "trial", "trial_setup", "tune_loggers"},
    "driver": {
        "actors", "best", "cluster", "config", "cpu_cost", "errors", "events", "fingerprint", "kept_examples", "mlflow_runs",
        "preflight", "results", "run_directory", "run_lock", "search_walk", "state", "storage", "store", "strategy",
        "sweep_toml", "task", "trial", "trial_setup", "tuning",
    },
    "jobs": {"errors"},
    "starter": {"errors"},
    "status": {"errors", "event_log", "plan", "report", "run_directory", "state", "storage"},
    "cli": {
        "actors", "best", "cluster", "config", "cpu_cost", "driver", "errors", "export", "jobs", "nodes", "plan",
        "preflight", "prune", "report", "run_directory", "run_lock", "served_best", "starter", "status", "storage", "store",
        "sweep_toml",
    },
    "__init__": {"best", "config", "driver", "errors", "results", "served_models", "sweep_toml", "task", "teachers"},
}  # fmt: skip

RAY_FREE = set(LAYERS) - {
    "space", "tune_loggers", "nodes", "actors", "trial_setup", "spread_evaluation", "trial", "cluster", "tuning", "driver",
    "jobs", "cli", "__init__",
}  # fmt: skip
TORCH_FREE = {"torch", "trl", "peft", "transformers", "datasets", "accelerate"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


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


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    part, allowed = part_of(path), LAYERS[part_of(path)]
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "bt_ray":
            imported = rest[0] if rest else "__init__"
            assert imported == part or imported in allowed, f"{part} may not import {name}"
        elif package == "ray":
            assert part not in RAY_FREE, f"{part} may not import ray"
        elif package == "vllm":
            assert path.name in {"vllm_main.py", "engine.py"}, "vLLM is a child process"
        elif package in TORCH_FREE:
            training = {PACKAGE / "training" / name for name in ("cores.py", "layers.py", "main.py", "trainer.py")}
            in_a_child = training | {PACKAGE / "serving" / "engine.py", PACKAGE / "arithmetic.py"}
            assert path in in_a_child, f"only the training process, and vLLM's, import {package}"


def test_layers_have_no_upward_edge() -> None:
    below: set[str] = set()
    for part, allowed in LAYERS.items():
        assert allowed <= below, f"{part} imports {allowed - below}, which stand above it"
        below.add(part)


def test_there_is_no_utils() -> None:
    assert not [path for path in modules() if path.stem in {"utils", "helpers", "common", "misc"}]


def test_importing_a_lower_layer_loads_no_ray_and_no_torch() -> None:
    parts = ["bt_ray", *(f"bt_ray.{part}" for part in sorted(RAY_FREE - {"report"}))]
    code = f"""
import importlib, sys
for part in {parts}:
    importlib.import_module(part)
    assert not (heavy := {{"ray", "vllm"}} | {TORCH_FREE}) & sys.modules.keys(), (part, heavy & sys.modules.keys())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
