"""The candidates of a run directory by name: `"p -> w"`, `"baseline"`, and under a variant `"p -> w [seed=1]"`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from bt_ray.errors import ConfigError, StorageError, nearest
from bt_ray.layout import CONFIG, RESULT, SWEEP
from bt_ray.run_dir.results import candidate_name
from bt_ray.run_dir.step_store import FinishedStep, StepStore
from bt_ray.run_dir.storage import Storage
from bt_ray.settings.config import SweepConfig, make_config
from bt_ray.settings.space import apply_values
from bt_ray.strategy import variant_name
from bt_ray.weights import FINE_TUNE, Weights

MOST_NAMED = 30
"""Candidates that a message names."""


@dataclass(frozen=True)
class FoundCandidate:
    """A candidate as it lies in its run directory.

    Attributes:
        name: What it is called.
        variant: The variant of the settings; `""` without a space.
        step: The step that produced it.
        config: The settings that it was computed under.
        weights: Those of its predictors with served LMs, by id.
    """

    name: str
    variant: str
    step: FinishedStep
    config: SweepConfig
    weights: Mapping[str, Weights]


@dataclass
class _Variant:
    settings: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Of its steps, by prefix."""


def find_candidate(storage: Storage, name: str) -> FoundCandidate:
    """The candidate that is called so.

    Raises:
        ConfigError: No sweep was run there, there is no such candidate, or its weights were removed.
    """
    values = storage.read_json(SWEEP)
    config = storage.read_json(CONFIG)
    if not isinstance(values, dict) or not isinstance(config, dict):
        raise ConfigError(f"{storage.location} is no run directory of a sweep: it has no {SWEEP}.")
    variants, store = _variants(storage, values), StepStore(storage)
    named = {candidate_name(p, v): (v, key) for v, variant in variants.items() for p, key in variant.keys.items()}
    wanted = name.strip() or "baseline"
    variant, key = named.get(wanted, ("", ""))
    step = store.read(key) if key else None
    if step is None:
        finished = store.read_all(key for _, key in named.values())
        raise ConfigError(_unknown(storage, wanted, [name for name, (_, key) in named.items() if key in finished]))
    settings = apply_values(make_config(config, source=f"{storage.location}/{CONFIG}"), variants[variant].settings)
    bases = read_bases(storage)
    weights = {id_: _find_weights(store, wanted, id_, bases) for id_ in dict.fromkeys(step.weights.values())}
    return FoundCandidate(wanted, variant, step, settings, weights)


def read_bases(storage: Storage) -> dict[str, Weights]:
    """The base models that the sweeps of a run directory served, by id; none where an earlier version noted none."""
    values = storage.read_json(SWEEP)
    bases = values.get("bases", {}) if isinstance(values, dict) else {}
    return {weights_id: Weights.from_json(base) for weights_id, base in bases.items()}


def _variants(storage: Storage, values: Mapping[str, Any]) -> dict[str, _Variant]:
    """The variants of all sweeps of a run directory, by name. Earlier versions kept only what labels and results tell."""
    if "variants" in values:
        return {name: _Variant(kept["settings"], kept["steps"]) for name, kept in values["variants"].items()}
    found: dict[str, _Variant] = {}
    for label, step in values.get("steps", {}).items():
        variant = label.partition(" [")[2].removesuffix("]")
        found.setdefault(variant, _Variant()).keys[step["prefix"]] = step["key"]
    for trial in (storage.read_json(RESULT) or {}).get("trials", ()):
        variant = found.setdefault(variant_name(trial["settings"]), _Variant())
        variant.settings = trial["settings"]
        variant.keys |= {c["prefix"]: PurePosixPath(c["program"]).parts[1] for c in trial["candidates"]}
    return found


def _unknown(storage: Storage, wanted: str, known: list[str]) -> str:
    more = f", and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    listed = ", ".join(f'"{name}"' for name in known[:MOST_NAMED]) or "none"
    return f'{storage.location} has no candidate "{wanted}".{nearest(wanted, known)} Its candidates: {listed}{more}.'


def _find_weights(store: StepStore, candidate: str, weights_id: str, bases: Mapping[str, Weights]) -> Weights:
    if weights_id in bases:
        return bases[weights_id]
    try:
        return store.read_weights(weights_id)
    except StorageError as error:
        if FINE_TUNE not in weights_id:
            raise ConfigError(
                f'Candidate "{candidate}": its run directory does not say where its model {weights_id} is. Run the sweep\'s '
                "command again: nothing is computed anew, and it is noted."
            ) from error
        raise ConfigError(
            f'The weights of candidate "{candidate}" were removed, by `bt-ray prune` if by nobody else: {error} A sweep '
            "that asks for this step computes it again."
        ) from error
