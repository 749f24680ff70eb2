"""What a run directory says of its sweep, read from anywhere that reaches it."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bt_ray.errors import ConfigError
from bt_ray.layout import CONFIG, EVENTS, STATUS
from bt_ray.report.plan import make_plan
from bt_ray.report.state import describe_waits, step_lines
from bt_ray.run_dir.run_directory import read_steps
from bt_ray.run_dir.status_file import SweepState
from bt_ray.run_dir.storage import Storage


@dataclass(frozen=True)
class Status:
    """What a sweep is doing.

    Attributes:
        state: As it was written last.
        now: When this was read: Unix time in seconds.
        finished: Steps that are finished, the baseline included.
        steps: All steps.
        computed: Steps that this run finished.
        left_s: Seconds that the others take, as far as finished ones tell; None if nothing tells.
        unknown: How many steps nothing tells of.
        waiting: The holders that wait for a server, and for how many seconds.
    """

    state: SweepState
    now: float
    finished: int
    steps: int
    computed: int
    left_s: float | None
    unknown: int
    waiting: Mapping[str, float]

    @property
    def lines(self) -> list[str]:
        """All but the tables, in words."""
        until = self.state.ended or self.state.at
        seconds = until - self.state.started
        lines = step_lines(self.finished, self.steps, self.computed, seconds, self.left_s, self.unknown)
        if self.state.dashboard and self.state.ended is None:
            lines.append(f"Ray's dashboard: {self.state.dashboard}")
        return [*lines, *describe_waits(self.waiting, self.state)]

    def to_json(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("now", "finished", "steps", "computed", "left_s", "unknown")}
        return {**self.state.to_json(), **counts, "waiting": dict(self.waiting)}


def read_status(storage: Storage) -> Status:
    """What the sweep of a run directory is doing.

    Raises:
        ConfigError: No sweep was run there.
    """
    keys, finished = read_steps(storage)
    values = storage.read_json(STATUS)
    if values is None:
        raise ConfigError(f"{storage.location} says nothing of its sweep: it has no {STATUS}.")
    state, now = SweepState.from_json(values), time.time()
    computed = [step for step in finished.values() if step.started >= state.started]
    plan = make_plan([], keys, finished, 0)
    servers = max(1, (storage.read_json(CONFIG) or {}).get("server", {}).get("count", 1))
    at_once = min(servers, len(plan.new)) or 1
    known = len(plan.new) > len(plan.estimate.unknown)
    left = plan.estimate.seconds / at_once if known and state.ended is None else None
    waiting = _find_waiting(storage, state, now) if state.ended is None else {}
    return Status(state, now, len(finished), len(keys), len(computed), left, len(plan.estimate.unknown), waiting)


def _find_waiting(storage: Storage, state: SweepState, now: float) -> dict[str, float]:
    """Who asked for a server in this run and has none yet, and for how many seconds."""
    asked: dict[int, tuple[str, float]] = {}
    for line in (storage.read(EVENTS) or b"").decode().splitlines():
        event = json.loads(line)
        if event["kind"] != "lease" or event["at"] < state.started:
            continue
        if event["state"] == "asked":
            asked[event["lease"]] = (event["holder"], event["at"])
        elif event["state"] == "holder died":
            asked = {number: ask for number, ask in asked.items() if ask[0] != event["holder"]}
        else:
            asked.pop(event["lease"], None)
    waits: dict[str, float] = {}
    for holder, at in asked.values():
        waits[holder] = max(waits.get(holder, 0.0), now - at)
    return waits
