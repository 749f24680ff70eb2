"""The run directory of a sweep that never ran: as many candidates as wanted, with failures, made in a moment."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import dspy

from bt_ray.run_dir.examples import examples_file, keep_examples
from bt_ray.run_dir.results import SweepResult, TrialResult
from bt_ray.run_dir.status_file import SweepState, TrialState
from bt_ray.run_dir.step_store import FinishedStep, StepStore
from bt_ray.run_dir.storage import Directory
from bt_ray.step import StepKey
from bt_ray.strategy import SEPARATOR, prefixes

BEGAN = 1_700_000_000.0
EXAMPLES = 40
LONG = "long" * 500
HOSTILE = '</script><script>throw new Error("injected")</script>'
IMAGE = '<img src="data:," onerror="console.error(1)">'
"""What a page must show and not run."""
STEP = FinishedStep("k", "parent", "p", 50.0, (1.0, 0.0), 0.0, 1.0, {"self": "base"}, "", 3, {"dspy": "3.4.1"})
"""A finished step, of no sweep."""


def made_sweep(folder: Path, max_length: int, *, ended: bool = True, kept: int = EXAMPLES) -> Directory:
    """A sweep of all strategies of `p`, `w` and `x` up to a length, where `x` fails after `w`.

    Args:
        folder: The run directory.
        max_length: Of the strategies.
        ended: Whether it has a result; else its last strategy is running.
        kept: The examples whose texts it has; 0 for a sweep of a version that kept none.
    """
    storage = Directory(folder)
    store = StepStore(storage)
    draw = random.Random(7)
    strategies = [SEPARATOR.join(keys) for n in range(1, max_length + 1) for keys in itertools.product("pwx", repeat=n)]
    keys = {"": "k0"} | {prefix: f"k{n}" for n, prefix in enumerate(strategies, start=1)}
    steps: dict[str, FinishedStep] = {}
    for number, (prefix, key) in enumerate(keys.items()):
        parent = prefix.rpartition(SEPARATOR)[0]
        if "w -> x" in prefix or (prefix and parent not in steps):
            continue
        share = min(0.95, 0.2 + 0.15 * len(prefixes(prefix)) + draw.uniform(-0.1, 0.1))
        scores = tuple(float(draw.random() < share) for _ in range(EXAMPLES))
        weights = f"m-ft-{key}" if prefix.endswith("w") else (steps[parent].weights["self"] if prefix else "m")
        state = program(prefix)
        steps[prefix] = FinishedStep(
            key=key,
            parent=keys[parent] if prefix else "",
            prefix=prefix,
            score=100 * sum(scores) / EXAMPLES,
            example_scores=scores,
            started=BEGAN + 10 * number,
            seconds=draw.uniform(20, 300),
            weights={"self": weights},
            program=store.write_program(key, "1-a", json.dumps(state).encode()),
            requests=draw.randrange(40, 400),
            versions={},
            prompt_tokens=draw.randrange(1_000, 100_000),
            completion_tokens=draw.randrange(1_000, 10_000),
            cut_off=7 if prefix == "p" else 0,
            example_errors={"AdapterParseError: no answer": 3} if prefix == "p" else {},
        )
        store.commit(steps[prefix], "1-a")
        if prefix.endswith("w"):
            storage.write_json(f"trainings/t{key}/{weights}/job.json", {"conversations": 24})
            storage.write_json(f"weights/{weights}/bt_ray_weights.json", {"conversations": 22, "cut_off": 3})
            losses = "".join(json.dumps({"step": n, "loss": 2 / n}) + "\n" for n in range(1, 30))
            storage.write(f"trainings/t{key}/{weights}/progress.jsonl", losses.encode())
    written = {
        prefix: {
            "prefix": prefix,
            "key": key,
            "parent": keys[prefix.rpartition(SEPARATOR)[0]] if prefix else "",
            "parts": {},
        }
        | {"trains": prefix.endswith("w")}
        for prefix, key in keys.items()
    }
    storage.write_json("sweep.json", {"steps": written})
    if kept:
        keep_examples(storage, examples_file(StepKey(**written[""])), [example(number) for number in range(1, kept + 1)])
    storage.write_json("config.json", {"task": "my/task.py:build", "model": "org/model", "seed": 0, "server": {"gpus": 1}})
    trials = [made_trial(strategy, steps) for strategy in strategies]
    storage.write_json("status.json", made_state(trials, ended=ended).to_json())
    storage.write("events.jsonl", "".join(json.dumps(event) + "\n" for event in made_events()).encode())
    if ended:
        storage.write_json("result.json", SweepResult(str(folder), tuple(trials), 5400.0).to_json())
    return storage


def example(number: int) -> dspy.Example:
    """A validation example, by the number that the page gives it: hostile in all that it has, long, or neither."""
    if number % 3 == 0:
        hostile = {"question": HOSTILE, IMAGE: IMAGE, "answer": HOSTILE}
        return dspy.Example(hostile).with_inputs("question", IMAGE)
    passage = LONG if number % 3 == 1 else "Short."
    return dspy.Example(question=f"number {number}", passage=passage, answer=2 * number).with_inputs("question", "passage")


def program(prefix: str) -> dict[str, Any]:
    """The state of a program whose instruction grows with each `p`, which adds a demo too."""
    times = prefix.count("p")
    demos = [{"question": f"number {n}", "answer": HOSTILE if n == 0 else str(2 * n)} for n in range(times)]
    return {"signature": {"instructions": "Double the number" + " carefully" * times + "."}, "demos": demos, "lm": None}


def made_trial(strategy: str, steps: dict[str, FinishedStep]) -> TrialResult:
    found = [steps[prefix] for prefix in ["", *prefixes(strategy)] if prefix in steps]
    error = None if strategy in steps else f"RuntimeError: {HOSTILE}\nand more"
    return TrialResult(strategy, tuple(step.candidate(strategy) for step in found), error, error)


def made_state(trials: list[TrialResult], *, ended: bool) -> SweepState:
    states = [
        TrialState(t.strategy, "", "ended", None, BEGAN, [c.score for c in t.candidates], t.error or "") for t in trials
    ]
    return SweepState(BEGAN, BEGAN + 5400, BEGAN + 5400 if ended else None, "Running", states)


def made_events() -> list[dict[str, Any]]:
    server = {"kind": "server", "server": 0}
    return [
        {**server, "at": BEGAN + 1, "state": "placing"},
        {**server, "at": BEGAN + 60, "state": "idle"},
        {**server, "at": BEGAN + 120, "state": "serving, start", "seconds": 40.0, "weights_id": "m"},
        {**server, "at": BEGAN + 600, "state": "training", "weights_id": "m"},
        {**server, "at": BEGAN + 1800, "state": "serving, swap", "seconds": 2.0, "weights_id": "m-ft-k2"},
        {**server, "at": BEGAN + 5000, "state": "idle"},
    ]
