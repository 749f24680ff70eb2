"""The run directory: where a sweep keeps everything, and whose it is."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bt_ray.errors import ConfigError, StorageError
from bt_ray.layout import CONFIG, RESULT, STATUS, SWEEP, TRIALS
from bt_ray.run_dir.step_store import FinishedStep, StepStore
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.settings.config import SweepConfig
from bt_ray.step import KIND, StepKey
from bt_ray.strategy import length
from bt_ray.weights import Weights

MOST_NAMED = 8
"""Changes that a message names."""


@dataclass(frozen=True)
class VariantSteps:
    """The steps of a variant of the settings.

    Attributes:
        settings: Its values of the space, by name.
        steps: The key of each step, by prefix.
    """

    settings: dict[str, Any]
    steps: dict[str, str]


def check_run_directory(run_dir: str, keys: Mapping[str, StepKey], *, accept_changes: bool) -> None:
    """Check that the sweep can be kept in `run_dir`.

    Raises:
        ConfigError: It cannot be written, holds something else, or finished steps that what changed since affects.
    """
    try:
        storage = open_storage(run_dir)
        storage.check_writable()
        theirs = storage.read_json(SWEEP)
        if theirs is None and not storage.names(""):
            return
    except StorageError as error:
        raise ConfigError(f"run_dir: {error}") from None
    if theirs is None:
        raise ConfigError(f"run_dir: {run_dir} holds other files. Choose a new directory with --run-dir.")
    if not _steps(theirs):
        raise ConfigError(f"run_dir: {run_dir} is of another sweep. Choose another directory with --run-dir.")
    if not accept_changes:
        _refuse_changes(storage, _steps(theirs), keys)


def _refuse_changes(storage: Storage, theirs: Mapping[str, Any], keys: Mapping[str, StepKey]) -> None:
    """Raises `ConfigError` if something changed since that finished steps depend on, or nobody can tell."""
    finished = StepStore(storage).read_all(theirs[prefix]["key"] for prefix in keys if prefix in theirs)
    both = [prefix for prefix in keys if prefix in theirs and theirs[prefix]["key"] in finished]
    affected = [prefix for prefix in both if theirs[prefix]["key"] != keys[prefix].key]
    if not affected:
        return
    if any(_kind(theirs[prefix]) != KIND for prefix in affected):
        raise ConfigError(
            f"run_dir: the keys of the finished steps in {storage.location} are of another kind "
            f"({_kind(theirs[affected[0]])}) than those of this version of bt_ray ({KIND}), so none of these steps is "
            f"used again: {_list_prefixes(affected)}. Choose another directory with --run-dir, or compute them again with "
            "--accept-changes."
        )
    valid = [prefix for prefix in both if prefix not in affected]
    raise ConfigError(
        f"run_dir: {storage.location} is of another sweep, or something changed since: {_changes(theirs, keys, affected)}. "
        f"That affects the finished steps {_list_prefixes(affected)}{f' but not {_list_prefixes(valid)}' if valid else ''}. "
        "Choose another directory with --run-dir, or compute them again with --accept-changes."
    )


def _kind(step: Mapping[str, Any]) -> int:
    return int(step.get("kind", 1))


def _changes(theirs: Mapping[str, Any], keys: Mapping[str, StepKey], affected: Sequence[str]) -> str:
    """The parts that differ, and in brackets what in them does, so far as it has a name."""
    parts: set[str] = set()
    named: set[str] = set()
    for prefix in affected:
        parts |= _different(theirs[prefix]["parts"], keys[prefix].parts)
        named |= _different(theirs[prefix].get("reached", {}), keys[prefix].reached)
    return describe_changes(parts, named)


def describe_changes(parts: Iterable[str], named: Iterable[str]) -> str:
    """Parts of steps, and in brackets what in them changed."""
    shown = sorted(named, key=lambda name: (name.startswith("value "), name))
    more = f" and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else ""
    brackets = f" ({', '.join(shown[:MOST_NAMED])}{more})" if shown else ""
    return ", ".join(sorted(parts)) + brackets


def _different(theirs: Mapping[str, str], ours: Mapping[str, str]) -> set[str]:
    return {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}


def _list_prefixes(prefixes: Sequence[str]) -> str:
    return ", ".join(f'"{prefix}"' if prefix else "the baseline" for prefix in prefixes)


def read_steps(storage: Storage) -> tuple[dict[str, StepKey], dict[str, FinishedStep]]:
    """The steps of a run directory by label, shorter ones first, and the finished ones.

    Raises:
        ConfigError: No sweep was run there.
    """
    known = _steps(storage.read_json(SWEEP))
    if not known:
        raise ConfigError(f"{storage.location} is no run directory of a sweep: it has no {SWEEP}.")
    keys = {label: StepKey(**step) for label, step in sorted(known.items(), key=lambda item: length(item[1]["prefix"]))}
    found = StepStore(storage).read_all(key.key for key in keys.values())
    return keys, {label: found[key.key] for label, key in keys.items() if key.key in found}


def _steps(values: Any) -> dict[str, Any]:
    steps = values.get("steps") if isinstance(values, dict) else None
    return steps if isinstance(steps, dict) else {}


def prepare_run_directory(
    storage: Storage,
    config: SweepConfig,
    keys: Mapping[str, StepKey],
    variants: Mapping[str, VariantSteps] | None = None,
    bases: Mapping[str, Weights] | None = None,
) -> None:
    """Make the directory the sweep's own. Finished steps, and the best program of an earlier run, are kept.

    Args:
        storage: The directory.
        config: The sweep's settings.
        keys: The key of each step, by its label, each once.
        variants: The steps of each variant, by its name.
        bases: The base models that the sweep serves, by id.
    """
    for name in (TRIALS, RESULT, STATUS):
        storage.delete(name)
    before = storage.read_json(SWEEP) or {}
    theirs = _steps(before)
    accepted = [prefix for prefix in keys if prefix in theirs and theirs[prefix]["key"] != keys[prefix].key]
    changes = list(before.get("accepted_changes", []))
    if accepted:
        changes.append({"at": time.time(), "steps": accepted, "changed": _changes(theirs, keys, accepted)})
    steps = {**theirs, **{prefix: key.to_json() for prefix, key in keys.items()}}
    named = {**before.get("variants", {}), **{name: asdict(variant) for name, variant in (variants or {}).items()}}
    served = {**before.get("bases", {}), **{id_: base.to_json() for id_, base in (bases or {}).items()}}
    written = {"key_kind": KIND, "steps": steps, "accepted_changes": changes, "variants": named, "bases": served}
    storage.write_json(SWEEP, written)
    storage.write_json(CONFIG, config.without_secrets())
