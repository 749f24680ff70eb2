"""What a run directory holds that nothing needs any more: weights, and checkpoints of fine-tunes that are finished."""

from dataclasses import dataclass, replace

from bt_ray.errors import ConfigError
from bt_ray.layout import BEST, BEST_MANIFEST, CHECKPOINTS, TRAININGS, WEIGHTS
from bt_ray.run_dir.run_directory import read_steps
from bt_ray.run_dir.storage import Storage


@dataclass(frozen=True)
class Prunable:
    """What can be removed.

    Attributes:
        names: Folders, relative to the run directory.
        size: Bytes in them.
        kept: Versions of weights that stay.
    """

    names: tuple[str, ...]
    size: int
    kept: int

    def without_what_is_needed(self, now: "Prunable") -> "Prunable":
        """What of this can still be removed."""
        return replace(self, names=tuple(name for name in self.names if name in now.names))


def find_prunable(storage: Storage, *, only_best: bool = False) -> Prunable:
    """The weights that no kept candidate needs.

    Kept are the finished steps, or, with `only_best`, the best program alone: weights of attempts that were lost, and of
    steps that were computed again, are needed by neither. Checkpoints stay while a step is missing that may need them.

    Raises:
        ConfigError: No sweep was run there, or, with `only_best`, it has no best program yet.
    """
    keys, finished = read_steps(storage)
    best = storage.read_json(f"{BEST}/{BEST_MANIFEST}")
    if only_best and best is None:
        raise ConfigError(f"--only-best: {storage.location} has no best program yet, so nothing is removed.")
    needed = set(best["predictors"].values()) if best is not None else set()
    if not only_best:
        needed |= {weights_id for step in finished.values() for weights_id in step.weights.values()}
    weights = storage.names(WEIGHTS)
    names = [f"{WEIGHTS}/{weights_id}" for weights_id in weights if weights_id not in needed]
    if len(finished) == len(keys):
        names += _checkpoints(storage)
    return Prunable(tuple(names), sum(storage.size(name) for name in names), sum(name in needed for name in weights))


def _checkpoints(storage: Storage) -> list[str]:
    attempts = [f"{TRAININGS}/{key}/{attempt}" for key in storage.names(TRAININGS) for attempt in _attempts(storage, key)]
    return [f"{attempt}/{CHECKPOINTS}" for attempt in attempts if storage.names(f"{attempt}/{CHECKPOINTS}")]


def _attempts(storage: Storage, key: str) -> list[str]:
    return [name for name in storage.names(f"{TRAININGS}/{key}") if not name.endswith(".json")]


def prune(storage: Storage, prunable: Prunable) -> None:
    """Remove it."""
    for name in prunable.names:
        storage.delete(name)
