"""Finished steps of other run directories, taken where their keys are those of this sweep's steps. These are only read.

A step's program, its scores on valset and testset, and its manifest are copied. Its weights are copied too, or stay where
they are and are referred to.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bt_ray.errors import ConfigError, StorageError
from bt_ray.layout import SWEEP, WEIGHTS
from bt_ray.run_dir.node_disk import Scratch
from bt_ray.run_dir.step_store import FinishedStep, StepStore, attempt_name
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.settings.config import SweepConfig
from bt_ray.step import KIND
from bt_ray.strategy import length
from bt_ray.weights import MANIFEST

TESTS = "tests"


@dataclass(frozen=True)
class Source:
    """A run directory that steps are taken from.

    Attributes:
        storage: The directory.
        steps: Those of its finished steps that are wanted and that no earlier source has, by key.
        kind: Of its keys. Steps with keys of another kind than ours are never taken.
        tests: Files with their programs' scores on testsets.
    """

    storage: Storage
    steps: Mapping[str, FinishedStep]
    kind: int
    tests: tuple[str, ...] = ()


def check_sources(config: SweepConfig, run_dir: str | None) -> None:
    """Raises `ConfigError` if a directory of `reuse` cannot be read, is none of a sweep, or is the sweep's own."""
    for location in config.reuse:
        if location == run_dir:
            raise ConfigError(f"reuse: {location} is this sweep's own run directory: its steps are used anyway.")
        try:
            values = open_storage(location).read_json(SWEEP)
        except StorageError as error:
            raise ConfigError(f"reuse: {error}") from None
        if not isinstance(values, dict) or not isinstance(values.get("steps"), dict):
            raise ConfigError(f"reuse: {location} is no run directory of a sweep: it has no {SWEEP}.")


def describe_sources(config: SweepConfig, run_dir: str, keys: Iterable[str], bases: Collection[str]) -> list[str]:
    """What a sweep would take from the directories of `reuse`, a line for each.

    Args:
        config: The sweep's settings.
        run_dir: Its run directory.
        keys: Those of its steps.
        bases: The ids of weights that are no fine-tunes.
    """
    wanted = {key: key for key in keys} if config.reuse else {}
    here = StepStore(open_storage(run_dir)).find_finished(wanted, bases) if wanted else {}
    return [describe_source(source) for source in find_sources(config, wanted.keys() - here.keys(), bases)]


def find_sources(config: SweepConfig, missing: Iterable[str], bases: Collection[str]) -> list[Source]:
    """What the directories of `reuse` have, in their order.

    Args:
        config: The sweep's settings.
        missing: The keys of the steps that the sweep lacks.
        bases: The ids of weights that are no fine-tunes.

    Raises:
        StorageError: A directory cannot be read.
    """
    wanted, sources = dict.fromkeys(missing), []
    for location in config.reuse:
        storage = open_storage(location)
        kind = int((storage.read_json(SWEEP) or {}).get("key_kind", 1))
        found = StepStore(storage).find_finished({key: key for key in wanted}, bases) if kind == KIND and wanted else {}
        steps = {key: replace(step, origin=location) for key, step in found.items()}
        tests = [name for name in storage.names(TESTS) if name.partition("-")[0] in steps] if steps else []
        sources.append(Source(storage, steps, kind, tuple(tests)))
        for key in steps:
            del wanted[key]
    return sources


def take_steps(
    sources: Sequence[Source], store: StepStore, config: SweepConfig, bases: Collection[str], fence: int
) -> list[str]:
    """Take the steps into a run directory.

    Args:
        sources: What there is to be taken.
        store: The run directory's.
        config: The sweep's settings: they say what becomes of weights.
        bases: The ids of weights that are no fine-tunes.
        fence: The number of this driver's first claim: what is taken counts over what earlier ones left.

    Returns:
        What was taken from where, a line for each source.

    Raises:
        StorageError: Something could not be read or written. What was taken until then counts.
    """
    lines = []
    for source in sources:
        size, copied = 0, set[str]()
        for step in sorted(source.steps.values(), key=lambda step: length(step.prefix)):
            for weights_id in sorted(set(step.weights.values()).difference(bases)):
                if not store.has_weights(weights_id):
                    size += _take_weights(source.storage, store.storage, weights_id, copy=config.reuse_weights == "copy")
                    copied.add(weights_id)
            _take_step(source.storage, store, step, fence)
        for name in source.tests:
            if (scores := source.storage.read(f"{TESTS}/{name}")) is not None:
                store.storage.write(f"{TESTS}/{name}", scores)
        lines.append(describe_source(source) + _describe_weights(len(copied), size, config))
    return lines


def describe_source(source: Source) -> str:
    """How many steps are taken from a source, or why none."""
    if source.kind != KIND:
        return f"No step is taken from {source.storage.location}: its keys are of another kind ({source.kind}, not {KIND})"
    if not source.steps:
        return f"No step is taken from {source.storage.location}: it has none of those that are missing"
    count = len(source.steps)
    return f"{count} {'step is' if count == 1 else 'steps are'} taken from {source.storage.location}"


def _describe_weights(count: int, size: int, config: SweepConfig) -> str:
    if not count:
        return ""
    fine_tunes = f"{count} fine-tune{'s' if count > 1 else ''}"
    return f", with {fine_tunes}" + (f" ({size / 1e9:.2f} GB)" if config.reuse_weights == "copy" else ", which stay there")


def _take_step(source: Storage, store: StepStore, step: FinishedStep, fence: int) -> None:
    attempt, state = attempt_name(fence), StepStore(source).read_program(step.program)
    store.commit(replace(step, program=store.write_program(step.key, attempt, state)), attempt)


def _take_weights(source: Storage, to: Storage, weights_id: str, *, copy: bool) -> int:
    """Copy weights, or have the run directory refer to them where they are. Returns the bytes that were copied."""
    name = f"{WEIGHTS}/{weights_id}"
    manifest = source.read_json(f"{name}/{MANIFEST}")
    if manifest is None:
        raise StorageError(f"The weights {name} in {source.location} are gone.")
    lies_in = open_storage(manifest["origin"]) if manifest.get("origin") else source
    if not copy:
        to.write_json(f"{name}/{MANIFEST}", {**manifest, "origin": lies_in.location})
        return 0
    if to.folder is not None:
        lies_in.download(name, to.folder / name)
    elif lies_in.folder is not None:
        to.upload(lies_in.folder / name, name, last=MANIFEST)
    else:
        with Scratch("reuse") as scratch:
            lies_in.download(name, scratch.folder / weights_id)
            to.upload(scratch.folder / weights_id, name, last=MANIFEST)
    return to.size(name)
