"""The fine-tunes of a run directory: one that was cut off goes on from its last checkpoint; none is repeated.

`trainings/<key>/` is for one fine-tune, named after all that it depends on. Each attempt at it has a folder of its own
there, under the id that its weights will have, and `finished.json` names the attempt whose weights are kept.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from bt_ray.errors import StorageError
from bt_ray.layout import CHECKPOINTS, TRAINING_FINISHED, TRAININGS, WEIGHTS
from bt_ray.run_dir.storage import Storage
from bt_ray.slot.node_weights import NodeWeights
from bt_ray.slot.training.job import CHECKPOINT_MANIFEST, PROGRESS, checkpoint_step
from bt_ray.weights import MANIFEST, Weights, fine_tuned

KEPT = ("job.json", "data.jsonl", PROGRESS, "log.txt")
"""An attempt's files that are kept beside its checkpoints."""
logger = logging.getLogger(__name__)


class Trainings:
    """The fine-tunes of one run directory, as one node runs them.

    Args:
        storage: The run directory.
        weights: The node's side of its weights.
        scratch: A folder on the node's own disk, for what is not written to the run directory at once.
    """

    def __init__(self, storage: Storage, weights: NodeWeights, scratch: Path) -> None:
        self.storage = storage
        self.weights = weights
        self._scratch = scratch

    def find_finished(self, key: str) -> Weights | None:
        """The weights of the fine-tune `key`, None if none has finished."""
        found = self.storage.read_json(f"{TRAININGS}/{key}/{TRAINING_FINISHED}")
        manifest = found and self.storage.read_json(f"{WEIGHTS}/{found['weights_id']}/{MANIFEST}")
        return fine_tuned(manifest) if manifest else None

    def attempt(self, key: str, weights_id: str) -> "Attempt":
        """A new attempt at the fine-tune `key`, from its last checkpoint if there is one."""
        name = f"{TRAININGS}/{key}/{weights_id}"
        folder = self.storage.folder / name if self.storage.in_place and self.storage.folder else self._scratch / weights_id
        folder.mkdir(parents=True, exist_ok=True)
        attempt = Attempt(self, key, weights_id, folder)
        for checkpoint in sorted(self._checkpoints(key), key=checkpoint_step, reverse=True):
            try:
                attempt.start_from(checkpoint)
            except StorageError as error:  # who wrote it may just remove it
                logger.warning("%s is left out: %s", checkpoint, error)
            else:
                break
        return attempt

    def _checkpoints(self, key: str) -> Iterator[str]:
        for attempt in self.storage.names(f"{TRAININGS}/{key}"):
            folder = f"{TRAININGS}/{key}/{attempt}/{CHECKPOINTS}"
            for name in self.storage.names(folder):
                if (
                    name.startswith("checkpoint-")
                    and self.storage.read_json(f"{folder}/{name}/{CHECKPOINT_MANIFEST}") is not None
                ):
                    yield f"{folder}/{name}"


class Attempt:
    """One attempt at a fine-tune.

    Attributes:
        weights_id: The id of its result.
        folder: Where its process works.
        output: Where it leaves the weights.
        checkpoint: The folder of the checkpoint that it starts from, None for the beginning.
    """

    def __init__(self, trainings: Trainings, key: str, weights_id: str, folder: Path) -> None:
        self._trainings = trainings
        self._storage = trainings.storage
        self._fine_tune = f"{TRAININGS}/{key}"
        self.weights_id = weights_id
        self._saved = -1
        self._started_from = ""
        self.folder = folder
        self.output = trainings.weights.folder_for(weights_id)
        self.checkpoint: Path | None = None

    def start_from(self, checkpoint: str) -> None:
        """Start from a checkpoint of an earlier attempt, and go on with its progress."""
        if self._in_place:
            assert self._storage.folder is not None
            self.checkpoint = self._storage.folder / checkpoint
        else:
            self.checkpoint = self.folder / "start" / checkpoint.rpartition("/")[2]
            self._storage.download(checkpoint, self.checkpoint)
        self._started_from = checkpoint
        before = self._storage.read(f"{checkpoint.rpartition(f'/{CHECKPOINTS}/')[0]}/{PROGRESS}") or b""
        known = [line for line in before.decode().splitlines() if _step(line) <= checkpoint_step(checkpoint)]
        (self.folder / PROGRESS).write_text("".join(f"{line}\n" for line in known))

    def save(self) -> None:
        """Copy the last checkpoint to the run directory, if the process does not work there.

        Failing is no reason to stop the process: the next one may get through.
        """
        if self._in_place:
            return
        try:
            whole = [file.parent for file in (self.folder / CHECKPOINTS).glob(f"*/{CHECKPOINT_MANIFEST}")]
            for checkpoint in sorted(whole, key=lambda folder: checkpoint_step(folder.name))[-1:]:
                self._save(checkpoint)
        except (OSError, StorageError) as error:
            logger.warning("A checkpoint could not be saved: %s", error)

    def _save(self, checkpoint: Path) -> None:
        if checkpoint_step(checkpoint.name) <= self._saved:
            return
        saved = f"{self._fine_tune}/{self.weights_id}/{CHECKPOINTS}"
        older = self._storage.names(saved)
        self._keep_files()
        self._storage.upload(checkpoint, f"{saved}/{checkpoint.name}", last=CHECKPOINT_MANIFEST)
        self._saved = checkpoint_step(checkpoint.name)
        for name in older:
            self._storage.delete(f"{saved}/{name}")

    def finish(self) -> Weights:
        """Let the weights count that the process left. Checkpoints are not needed any more."""
        manifest = json.loads((self.output / MANIFEST).read_text())
        self._trainings.weights.keep(self.weights_id)
        self._storage.write_json(f"{self._fine_tune}/{TRAINING_FINISHED}", {"weights_id": self.weights_id})
        for attempt in self._storage.names(self._fine_tune):
            if attempt != TRAINING_FINISHED:
                self._storage.delete(f"{self._fine_tune}/{attempt}/{CHECKPOINTS}")
        return fine_tuned(manifest)

    def forget_start(self) -> None:
        """Remove the checkpoint that this attempt started from: it came to nothing."""
        if self._started_from:
            logger.warning("The checkpoint %s led nowhere and is removed", self._started_from)
            try:
                self._storage.delete(self._started_from)
            except StorageError as error:
                logger.warning("It could not be removed: %s", error)

    def close(self) -> None:
        """Keep what tells how the attempt went, and remove weights that are not whole."""
        if not (self.output / MANIFEST).exists() or not self._in_place:
            self._trainings.weights.discard(self.weights_id)
        if self._in_place:
            return
        try:
            self._keep_files()
        except StorageError as error:
            logger.warning("The files of training %s could not be kept: %s", self.weights_id, error)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep_files(self) -> None:
        for name in KEPT:
            if (file := self.folder / name).exists():
                self._storage.write(f"{self._fine_tune}/{self.weights_id}/{name}", file.read_bytes())

    @property
    def _in_place(self) -> bool:
        return self._storage.in_place


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line that was cut off
