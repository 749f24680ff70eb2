"""The step store: each finished step under its key, written once, its manifest last.

`steps/<key>/` holds one folder for each attempt, with the program, and a manifest for each attempt that was committed.
Attempts are named after their claim's fencing number, `000001000003-5eb0d2`, and the highest counts. A key without a
readable manifest does not exist.
"""

import logging
import math
import secrets
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from bt_ray.errors import StorageError
from bt_ray.layout import STEPS, WEIGHTS
from bt_ray.run_dir.results import Candidate
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.weights import MANIFEST, Weights, fine_tuned, weights_gone

SCHEMA_VERSION = 1
READERS = 16
"""Steps that are read at the same time: an object store takes milliseconds for each request."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedStep:
    """A step that was committed.

    Attributes:
        key: What it is the result of.
        parent: The key of the step that it started from, `""` for the baseline.
        prefix: The strategy that led to it.
        score: On the valset, in percent; None without validation.
        example_scores: The metric's value for each valset example, in order.
        started: Unix time in seconds.
        seconds: Compiling and evaluating.
        weights: The id of the weights that each predictor uses, by the predictor's name.
        program: The file of DSPy's JSON state, relative to the run directory.
        requests: Requests that servers answered for it.
        versions: Of the packages that computed it.
        prompt_tokens: Tokens in, of those requests.
        completion_tokens: Tokens out.
        cut_off: Answers that ended because `max_tokens` or the context was full.
        api_models: The model of each predictor whose LM no server of the sweep answers for, by the predictor's name.
        example_errors: What the program or the metric raised for examples, which scored 0 for that, and for how many.
        origin: The run directory that it was taken from; `""` if it was computed in its own.
    """

    key: str
    parent: str
    prefix: str
    score: float | None
    example_scores: tuple[float, ...]
    started: float
    seconds: float
    weights: dict[str, str]
    program: str
    requests: int
    versions: dict[str, str]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut_off: int = 0
    api_models: dict[str, str] = field(default_factory=dict)
    example_errors: dict[str, int] = field(default_factory=dict)
    origin: str = ""

    def candidate(self, strategy: str, variant: str = "", valset: str = "") -> Candidate:
        """The step as a candidate of `strategy`, which has it as a prefix, under a variant of the settings.

        Args:
            strategy: The strategy.
            variant: The variant's name.
            valset: A hash of the variant's validation examples.
        """
        return Candidate(
            strategy=strategy,
            prefix=self.prefix,
            score=self.score,
            example_scores=self.example_scores,
            started=self.started,
            seconds=self.seconds,
            weights=self.weights,
            program=self.program,
            api_models=self.api_models,
            variant=variant,
            example_errors=self.example_errors,
            valset=valset,
            origin=self.origin,
        )


class StepStore:
    """The finished steps of a run directory."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read(self, key: str) -> FinishedStep | None:
        """The finished step of `key`, None if there is none that this version can read."""
        return self._newest(key, self.storage.names(f"{STEPS}/{key}"))

    def _newest(self, key: str, names: Iterable[str]) -> FinishedStep | None:
        """The finished step of a key in whose folder these are."""
        folder = f"{STEPS}/{key}"
        for name in sorted((name for name in names if name.startswith("manifest-")), reverse=True):
            step = _parse(self.storage.read_json(f"{folder}/{name}"))
            if step is not None and step.key == key and self.storage.read_json(step.program) is not None:
                return step
            logger.warning("%s/%s/%s is not usable: the step counts as not computed", self.storage.location, folder, name)
        return None

    def write_program(self, key: str, attempt: str, state: bytes) -> str:
        """Write the program of an attempt, which does not count yet. Returns its file, relative to the run directory."""
        name = f"{STEPS}/{key}/{attempt}/program.json"
        self.storage.write(name, state)
        return name

    def read_program(self, program: str) -> bytes:
        """DSPy's JSON state of a step's or a candidate's program.

        Raises:
            StorageError: It is gone.
        """
        state = self.storage.read(program)
        if state is None:
            raise StorageError(f"{program} in {self.storage.location} is gone.")
        return state

    def read_all(self, keys: Iterable[str]) -> dict[str, FinishedStep]:
        """The finished steps of these keys, by key: found by one listing, and read several at a time."""
        listed: dict[str, list[str]] = {}
        for file in self.storage.files(STEPS):
            key, _, name = file.partition("/")
            listed.setdefault(key, []).append(name)
        there = [key for key in dict.fromkeys(keys) if key in listed]
        with ThreadPoolExecutor(READERS) as readers:
            found = zip(there, readers.map(lambda key: self._newest(key, listed[key]), there), strict=True)
            return {key: step for key, step in found if step is not None}

    def find_finished(self, keys: Mapping[str, str], bases: Collection[str]) -> dict[str, FinishedStep]:
        """The steps of `keys`, keys by prefix, that are finished and whose weights are there, by prefix.

        `bases` are the ids of weights that are no fine-tunes.
        """
        steps = self.read_all(keys.values())
        tuned = sorted({weights_id for step in steps.values() for weights_id in step.weights.values()}.difference(bases))
        with ThreadPoolExecutor(READERS) as readers:
            manifests = zip(tuned, readers.map(self._weights_manifest, tuned), strict=True)
            gone = {weights_id for weights_id, manifest in manifests if manifest is None}
        found = ((prefix, steps.get(key)) for prefix, key in keys.items())
        return {prefix: step for prefix, step in found if step is not None and gone.isdisjoint(step.weights.values())}

    def has_weights(self, weights_id: str) -> bool:
        """Whether what a finished fine-tune left is there, or where the run directory refers to."""
        return self._weights_manifest(weights_id) is not None

    def _weights_manifest(self, weights_id: str) -> Any:
        name = f"{WEIGHTS}/{weights_id}/{MANIFEST}"
        manifest = self.storage.read_json(name)
        if manifest is not None and (origin := manifest.get("origin")) is not None:
            return manifest if open_storage(origin).read_json(name) is not None else None
        return manifest

    def read_weights(self, weights_id: str) -> Weights:
        """The weights that a finished fine-tune left.

        Raises:
            StorageError: They are gone.
        """
        manifest = self._weights_manifest(weights_id)
        if manifest is None:
            path = f"{WEIGHTS}/{weights_id}"
            left = self.storage.read_json(f"{path}/{MANIFEST}") or {}
            raise weights_gone(path, self.storage.location, left.get("origin"))
        return fine_tuned(manifest)

    def commit(self, step: FinishedStep, attempt: str) -> None:
        """Let an attempt count, from this moment on. The step's program and weights are written."""
        name = f"{STEPS}/{step.key}/manifest-{attempt}.json"
        self.storage.write_json(name, {"schema_version": SCHEMA_VERSION, **asdict(step)})


def attempt_name(fence: int) -> str:
    """A new name for an attempt under the claim of this number; of two commits, that of the later claim counts."""
    return f"{fence:012d}-{secrets.token_hex(3)}"


def _parse(values: Any) -> FinishedStep | None:
    if not isinstance(values, dict) or values.pop("schema_version", None) != SCHEMA_VERSION:
        return None
    try:
        step = FinishedStep(**{**values, "example_scores": tuple(values["example_scores"])})
        return step if all(map(math.isfinite, [*step.example_scores, step.score or 0.0])) else None
    except (KeyError, TypeError):
        return None
