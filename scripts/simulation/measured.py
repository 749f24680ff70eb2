"""The times that a finished sweep took, from its events and its steps."""

import itertools
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bt_ray.run_dir.run_directory import read_steps
from bt_ray.run_dir.step_store import FinishedStep
from bt_ray.run_dir.storage import open_storage
from simulation.schedules import trains
from simulation.sweep import Times


@dataclass(frozen=True)
class Held:
    """A lease, from its grant to its end, in Unix time.

    Attributes:
        holder: Who had it: `"trial p -> w"`, and of further processes of a trial `"trial p -> w, process 2"`.
        server: The server's number.
        exclusive: Whether it was for a training.
        began: When it was granted.
        ended: When it was given back or revoked, or its holder died.
    """

    holder: str
    server: int
    exclusive: bool
    began: float
    ended: float


def held_leases(events: Iterable[Mapping[str, Any]]) -> list[Held]:
    """The leases that were granted and have ended."""
    granted: dict[int, Mapping[str, Any]] = {}
    held = []
    for event in events:
        lease, state = event.get("lease"), event.get("state")
        if state == "granted":
            granted[event["lease"]] = event
        over = [lease] if state in ("ended", "revoked") else []
        if state == "holder died":
            over = [number for number, grant in granted.items() if grant["holder"] == event["holder"]]
        grants = [granted.pop(number) for number in over if number in granted]
        held += [Held(grant["holder"], grant["server"], grant["exclusive"], grant["at"], event["at"]) for grant in grants]
    return held


def busy_seconds(held: Sequence[Held]) -> float:
    """How long servers had leases, summed over the servers."""
    busy, until = 0.0, defaultdict[int, float](float)
    for lease in sorted(held, key=lambda lease: lease.began):
        busy += max(0.0, lease.ended - max(lease.began, until[lease.server]))
        until[lease.server] = max(until[lease.server], lease.ended)
    return busy


def alone_seconds(step: FinishedStep, held: Sequence[Held]) -> float:
    """Seconds of a server alone that a step's requests took: leases on a server at the same time have equal parts of it.

    They are those that trials with this step in their strategies had while it was computed, as all but one wait for it.
    """
    on_its_way = re.compile(rf"(trial {re.escape(step.prefix)}\b.*?)(, process \d+)?")
    of_trials: defaultdict[str, float] = defaultdict(float)
    for lease in held:
        trial = on_its_way.fullmatch(lease.holder)
        if trial is None or lease.exclusive:
            continue
        began, ended = max(lease.began, step.started), min(lease.ended, step.started + step.seconds)
        beside = [other for other in held if other.server == lease.server and not other.exclusive]
        changes = {at for other in beside for at in (other.began, other.ended) if began < at < ended}
        for since, until in itertools.pairwise(sorted({began, *changes, ended}) if began < ended else []):
            of_trials[trial[1]] += (until - since) / sum(other.began <= since and until <= other.ended for other in beside)
    return max(of_trials.values(), default=0.0)


def measured(run_dir: Path) -> Times:
    """Medians of the times that a finished sweep took."""
    storage = open_storage(str(run_dir.resolve()))
    _, finished = read_steps(storage)
    events = [json.loads(line) for line in (storage.read("events.jsonl") or b"").splitlines()]
    held = held_leases(events)
    alone = {step.prefix: alone_seconds(step, held) for step in finished.values()}
    evaluated = alone.get("") or Times.evaluate
    seconds = {
        "start": [event["seconds"] for event in events if event.get("state") == "serving, start"],
        "swap": [event["seconds"] for event in events if event.get("state") == "serving, swap"],
        "train": [lease.ended - lease.began for lease in held if lease.exclusive],
        "prompt": [max(0.0, took - evaluated) for prefix, took in alone.items() if prefix and not trains(prefix)],
        "evaluate": [evaluated],
    }
    return replace(Times(), **{what: statistics.median(values) for what, values in seconds.items() if values})
