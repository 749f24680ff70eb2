"""What a report shows, read from a run directory: of a sweep that ended, or of one that runs."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bt_ray.layout import CONFIG, EVENTS, RESULT, STATUS, TRAININGS, WEIGHTS
from bt_ray.report.comparison import Interval, Verdict, interval, verdict
from bt_ray.run_dir.examples import KeptExample, examples_file, read_examples
from bt_ray.run_dir.results import SweepResult, TrialResult
from bt_ray.run_dir.run_directory import read_steps
from bt_ray.run_dir.status_file import SweepState
from bt_ray.run_dir.step_store import FinishedStep, StepStore
from bt_ray.run_dir.storage import Storage
from bt_ray.step import StepKey
from bt_ray.strategy import SEPARATOR, prefixes, step_label
from bt_ray.weights import MANIFEST

STATES = {"placing": "waiting", "idle": "idle", "training": "training", "lost": "down", "failed": "down", "dead": "down"}


@dataclass(frozen=True)
class Cost:
    """What steps took.

    Attributes:
        seconds: Of time, one after the other.
        gpu_seconds: Of the GPUs of a server, for as long; 0 on a CPU.
        requests: That servers answered.
        tokens_in: Of those requests.
        tokens_out: Of their answers.
        money: In whatever the price per GPU hour is in; None without a price.
    """

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    money: float | None = None

    def plus(self, other: "Cost") -> "Cost":
        money = None if self.money is None or other.money is None else self.money + other.money
        return Cost(
            self.seconds + other.seconds,
            self.gpu_seconds + other.gpu_seconds,
            self.requests + other.requests,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            money,
        )


@dataclass(frozen=True)
class Training:
    """How a fine-tune went.

    Attributes:
        examples: Conversations that it was given.
        learnt: Those that it learnt from; the prompts of the others fill `train.max_length` alone. None if unknown.
        cut_off: Those of which it did not learn the end, because they are longer. None if unknown.
        losses: Of each optimizer step, in order.
    """

    examples: int
    learnt: int | None
    cut_off: int | None
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Predictor:
    """The prompt of one predictor.

    Attributes:
        instructions: What the model is told to do.
        demos: The examples in the prompt: their fields by name.
    """

    instructions: str
    demos: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Node:
    """A step of the trie, finished or not.

    Attributes:
        label: Names it: its prefix, and its variant in brackets.
        optimizer: The key of its optimizer; `"baseline"` for the first.
        key: Of the step.
        parent: The key of the step that it started from; `""` for a baseline.
        step: What it gave; None while it is not finished.
        cost: Of this step alone.
        path_cost: Of all steps that led to its program.
        predictors: By name.
        trainings: Of the weights that its predictors use and its parent's did not.
        spread: The interval of its score.
        valset: The file of the examples that it was evaluated on, `""` if unknown; a sweep may not have kept them.
        examples: A hash of those examples, `""` if unknown.
    """

    label: str
    optimizer: str
    key: str
    parent: str
    step: FinishedStep | None = None
    cost: Cost = Cost()
    path_cost: Cost = Cost()
    predictors: Mapping[str, Predictor] = field(default_factory=dict)
    trainings: tuple[Training, ...] = ()
    spread: Interval | None = None
    valset: str = ""
    examples: str = ""


@dataclass(frozen=True)
class Segment:
    """A time in which a server did one thing: `"waiting"`, `"starting"`, `"swapping"`, `"serving"`, `"training"`, `"idle"`,
    `"down"`. Times are Unix times in seconds.
    """

    server: int
    state: str
    start: float
    end: float
    weights_id: str = ""


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
        location: Of the run directory.
        config: The sweep's settings.
        nodes: Its steps, by key, each after its parent.
        valsets: The examples that steps were evaluated on, as far as they are kept, by file.
        trials: Its strategies.
        segments: What its servers did, and when.
        state: What it is doing.
        seconds: That it took.
        verdict: Whether the best program can be told from the others; None if there is nothing to compare it with.
        result: None while it has none.
        ranked_by: How many different valsets its programs were ranked by.
    """

    location: str
    config: Mapping[str, Any]
    nodes: Mapping[str, Node]
    valsets: Mapping[str, tuple[KeptExample, ...]]
    trials: tuple[TrialResult, ...]
    segments: tuple[Segment, ...]
    state: SweepState
    seconds: float
    verdict: Verdict | None
    result: SweepResult | None
    ranked_by: int = 1

    @property
    def total(self) -> Cost:
        """What all finished steps took."""
        total = Cost(money=0.0)
        for node in self.nodes.values():
            if node.step is not None:
                total = total.plus(node.cost)
        return total


def read_report(storage: Storage, gpu_hour_price: float | None = None) -> Report:
    """Read what a run directory holds.

    Raises:
        ConfigError: No sweep was run there.
    """
    keys, finished = read_steps(storage)
    config = storage.read_json(CONFIG) or {}
    gpus = _gpus(config)
    written = storage.read_json(RESULT)
    result = SweepResult.from_json(written) if written is not None else None
    state = _state(storage, finished, result)
    store = StepStore(storage)
    trained = dict(_trainings(storage))
    files = _example_files(keys.values())
    valsets = {file: kept for file in sorted(set(files.values())) if (kept := read_examples(storage, file))}
    nodes: dict[str, Node] = {}
    for label, key in keys.items():
        if key.key in nodes:
            continue
        step, above = finished.get(label), nodes.get(key.parent)
        prefix, _, variant = label.partition(" [")
        name = (prefix.rpartition(SEPARATOR)[2] or "baseline") + (f" [{variant}" if variant else "")
        if step is None:
            nodes[key.key] = Node(label or "baseline", name, key.key, key.parent)
            continue
        cost = _cost(step, gpus, gpu_hour_price)
        new = set(step.weights.values()) - set(above.step.weights.values() if above and above.step else ())
        nodes[key.key] = Node(
            label or "baseline",
            name,
            key.key,
            key.parent,
            step,
            cost,
            above.path_cost.plus(cost) if above is not None else cost,
            _predictors(json.loads(store.read_program(step.program))),
            tuple(trained[weights_id] for weights_id in sorted(new) if weights_id in trained),
            interval(step.example_scores),
            files.get(key.key, ""),
            key.valset,
        )
    until = state.ended or state.at
    segments = tuple(_segments(storage, state.started, until))
    trials = result.trials if result is not None else _read_running_trials(state, keys, finished)
    seconds = until - state.started if result is None else result.seconds
    shown = SweepResult(storage.location, trials, seconds)
    best, ranked_by = verdict(result or shown), (result or shown).valsets
    return Report(storage.location, config, nodes, valsets, trials, segments, state, seconds, best, result, ranked_by)


def _state(storage: Storage, finished: Mapping[str, FinishedStep], result: SweepResult | None) -> SweepState:
    """What the sweep is doing; as far as its steps tell, where it was run before there was a status."""
    written = storage.read_json(STATUS)
    if written is not None:
        return SweepState.from_json(written)
    began = min((step.started for step in finished.values()), default=time.time())
    return SweepState(started=began, ended=began + result.seconds if result is not None else None)


def _example_files(keys: Iterable[StepKey]) -> dict[str, str]:
    """Where the examples would be kept that a step was evaluated on, those of its baseline, by the step's key.

    Args:
        keys: Of all steps, each after its parent's.
    """
    files: dict[str, str] = {}
    for key in keys:
        file = files.get(key.parent) if key.parent else examples_file(key)
        if file is not None:
            files[key.key] = file
    return files


def _read_running_trials(
    state: SweepState, keys: Mapping[str, StepKey], finished: Mapping[str, FinishedStep]
) -> tuple[TrialResult, ...]:
    """The trials of a sweep that has no result yet, as far as their steps are finished."""
    trials = []
    for trial in state.trials:
        labels = [step_label(prefix, trial.variant) for prefix in ["", *prefixes(trial.strategy)]]
        steps = [(finished[label], keys[label].valset) for label in labels if label in finished]
        candidates = tuple(step.candidate(trial.strategy, trial.variant, valset) for step, valset in steps)
        trials.append(TrialResult(trial.strategy, candidates, trial.error or None))
    return tuple(trials)


def _gpus(config: Mapping[str, Any]) -> float:
    """Of each server of the sweep's own model."""
    server = config.get("server", {})
    own = server.get("models", {}).get(config.get("model"), {})
    return float({**server, **own}.get("gpus", 0))


def _cost(step: FinishedStep, gpus: float, gpu_hour_price: float | None) -> Cost:
    money = None if gpu_hour_price is None else step.seconds * gpus / 3600 * gpu_hour_price
    return Cost(step.seconds, step.seconds * gpus, step.requests, step.prompt_tokens, step.completion_tokens, money)


def _predictors(state: Mapping[str, Any]) -> dict[str, Predictor]:
    """The predictors of DSPy's JSON state of a program, which is a predictor itself or has them by name."""
    if "signature" in state:
        return {"self": _predictor(state)}
    return {name: _predictor(inner) for name, inner in state.items() if isinstance(inner, dict) and "signature" in inner}


def _predictor(state: Mapping[str, Any]) -> Predictor:
    demos = tuple({name: str(value) for name, value in demo.items()} for demo in state.get("demos", ()))
    return Predictor(str(state["signature"].get("instructions", "")), demos)


def _trainings(storage: Storage) -> Iterator[tuple[str, Training]]:
    """Each fine-tune, by the id of its weights."""
    for key in storage.names(TRAININGS):
        for weights_id in storage.names(f"{TRAININGS}/{key}"):
            folder = f"{TRAININGS}/{key}/{weights_id}"
            job = storage.read_json(f"{folder}/job.json")
            if job is not None:
                lines = (storage.read(f"{folder}/progress.jsonl") or b"").decode().splitlines()
                losses = tuple(float(entry["loss"]) for entry in map(_line, lines) if entry.get("loss") is not None)
                made = storage.read_json(f"{WEIGHTS}/{weights_id}/{MANIFEST}") or {}
                yield weights_id, Training(int(job["conversations"]), made.get("conversations"), made.get("cut_off"), losses)


def _segments(storage: Storage, started: float, until: float) -> Iterator[Segment]:
    """What each server did from `started` to `until`."""
    events = [_line(line) for line in (storage.read(EVENTS) or b"").decode().splitlines()]
    changes: dict[int, list[Mapping[str, Any]]] = {}
    for change in events:
        if change.get("kind") == "server" and change["state"] != "leaving" and change["at"] >= started:
            changes.setdefault(change["server"], []).append(change)
    for server, told in sorted(changes.items()):
        for event, after in zip(told, [*told[1:], None], strict=True):
            yield from _segment(server, event, after, until)


def _segment(server: int, event: Mapping[str, Any], after: Mapping[str, Any] | None, until: float) -> Sequence[Segment]:
    """What a server did from an event to the next; the time that it took to come there belongs to the next."""
    end = until if after is None else after["at"] - (after.get("seconds") or 0.0)
    state, _, how = event["state"].partition(", ")
    weights_id = event.get("weights_id", "")
    took = event.get("seconds") or 0.0
    came = "starting" if how == "start" else "swapping"
    before = (
        [Segment(server, came, event["at"] - took, event["at"], weights_id)] if took and how in ("start", "swap") else []
    )
    if state == "released":
        return before
    return [*before, Segment(server, STATES.get(state, state), event["at"], max(end, event["at"]), weights_id)]


def _line(line: str) -> dict[str, Any]:
    """A line of JSON; of one that is being written, nothing."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
