"""What weights answered, in engines that were seen to have loaded them right: kept in the run directory, by platform."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt_ray.errors import ServerError, StorageError
from bt_ray.layout import CANARIES
from bt_ray.run_dir.storage import Storage
from bt_ray.slot.canary import FIXED_SEQUENCES, TOLERANCE, Canary, describe_change, difference
from bt_ray.slot.serving.server import ServerProcess
from bt_ray.weights import MANIFEST, Weights

logger = logging.getLogger(__name__)


class Unverified(ServerError):
    """A server does not answer as its weights should, or nothing tells how they should."""


@dataclass(frozen=True)
class Expected:
    """How weights should answer.

    Attributes:
        weights_id: The weights.
        sequences: What is asked.
        by_platform: The log-probabilities that engines gave which had loaded them right.
        trainer: What their trainer says; None for weights that nobody trained here.
        tolerance: What an engine here may be off from that.
    """

    weights_id: str
    sequences: Sequence[Sequence[int]]
    by_platform: dict[str, list[list[float]]]
    trainer: Canary | None
    tolerance: float = TOLERANCE

    @property
    def trainer_tells(self) -> bool:
        """Whether what the trainer says tells these weights from those that they were trained from."""
        return self.trainer is not None and self.trainer.tells_from_parent(self.tolerance)


class KnownAnswers:
    """The canaries of a run directory.

    Args:
        storage: The run directory.
        keeps: Whether what servers answer is added to it. Else it is only remembered.
    """

    def __init__(self, storage: Storage, *, keeps: bool) -> None:
        self._storage = storage
        self._keeps = keeps
        self._seen: dict[str, dict[str, list[list[float]]]] = {}

    def expect(self, weights: Weights, dtype: str | None) -> Expected:
        """How loadable weights should answer, in an engine that computes in `dtype`; None: it chooses by itself."""
        kept = {**(self._storage.read_json(f"{CANARIES}/{weights.id}.json") or {}), **self._seen.get(weights.id, {})}
        trainer = self._trainer(weights)
        sequences = trainer.sequences if trainer is not None else FIXED_SEQUENCES
        tolerance = trainer.tolerance(dtype) if trainer is not None else TOLERANCE
        return Expected(weights.id, sequences, kept, trainer, tolerance)

    def check_fresh(self, server: ServerProcess, expected: Expected) -> None:
        """Check a server that has just started from files that are whole; what it answers is kept.

        Raises:
            Unverified: An engine of the same platform answered otherwise.
        """
        answered, platform = server.logprobs(expected.weights_id, expected.sequences)
        self._compare(expected, answered, platform)
        self._keep(expected, answered, platform)

    def check_swapped(self, server: ServerProcess, expected: Expected) -> None:
        """Check a server that has loaded weights in place of others; what it answers is kept.

        Raises:
            Unverified: It answers otherwise than it should, or nothing tells how it should.
        """
        answered, platform = server.logprobs(expected.weights_id, expected.sequences)
        if not self._compare(expected, answered, platform):
            if expected.trainer is None or not expected.trainer_tells:
                raise Unverified("nothing tells yet how these weights answer here")
            if (wrong := difference(expected.trainer, answered, expected.tolerance)) is not None:
                raise Unverified(f"it does not answer as the weights {expected.weights_id} were trained to: {wrong}")
        self._keep(expected, answered, platform)

    def _compare(self, expected: Expected, answered: list[list[float]], platform: str) -> bool:
        """Whether an engine of this platform answered before, and so as now."""
        before = expected.by_platform.get(platform)
        if before is None:
            return False
        if (wrong := describe_change(before, answered, platform)) is not None:
            raise Unverified(f"it does not answer as the weights {expected.weights_id} did before: {wrong}")
        return True

    def _keep(self, expected: Expected, answered: list[list[float]], platform: str) -> None:
        if platform in expected.by_platform:
            return
        self._seen.setdefault(expected.weights_id, {})[platform] = answered
        if not self._keeps:
            return
        name = f"{CANARIES}/{expected.weights_id}.json"
        try:
            self._storage.write_json(name, {**(self._storage.read_json(name) or {}), platform: answered})
        except (StorageError, ValueError) as error:  # this slot knows it all the same; NaN is no JSON
            logger.warning("%s could not be kept: %s", name, error)

    def _trainer(self, weights: Weights) -> Canary | None:
        manifest = _manifest(weights)
        return Canary.from_json(manifest["canary"]) if manifest.get("canary") else None


def expects_swap(expected: Expected) -> bool:
    """Whether a swap to these weights could be verified, as far as is known before it."""
    return bool(expected.by_platform) or expected.trainer_tells


def _manifest(weights: Weights) -> dict[str, Any]:
    if weights.parent is None:
        return {}
    manifest: dict[str, Any] = json.loads(Path(weights.path, MANIFEST).read_text())
    return manifest
