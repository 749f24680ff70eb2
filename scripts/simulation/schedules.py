"""Schedules of a sweep's steps: what none can beat, and the best that there is."""

from collections.abc import Mapping
from typing import Any

from bt_ray.strategy import BASELINE, SEPARATOR, length, parent

EXHAUSTIVE = 15
"""Steps up to which all schedules are tried."""


def trains(prefix: str) -> bool:
    """Whether a step fine-tunes: the optimizer's key begins with `w`."""
    return prefix.rpartition(SEPARATOR)[2].startswith("w")


def lower_bound(work: Mapping[str, tuple[float, float]], slots: int) -> float:
    """Seconds that no schedule can beat: the longest path, and for each t, t and what cannot start before it.

    Args:
        work: Of each step, the seconds that it takes alone, and those of a slot that it takes at least.
        slots: Slots.
    """
    begins: dict[str, float] = {}
    longest = 0.0
    for step in sorted(work, key=length):
        begins[step] = begins[parent(step)] + work[parent(step)][0] if step else 0.0
        longest = max(longest, begins[step] + work[step][0])
    later = 0.0
    for step in sorted(work, key=begins.__getitem__, reverse=True):
        later += work[step][1]
        longest = max(longest, begins[step] + later / slots)
    return longest


def best_makespan(seconds: Mapping[str, float], slots: int) -> float:
    """The makespan of the best schedule of steps that take these seconds, each on one slot, after their parents.

    Up to `EXHAUSTIVE` steps it is found by trying; above, it is what no schedule can beat.
    """
    bound = lower_bound({step: (took, took) for step, took in seconds.items()}, slots)
    return bound if len(seconds) > EXHAUSTIVE else _Schedules(seconds, slots, bound).best()


Running = tuple[tuple[float, str], ...]
"""When each step ends that is under way, and the step."""


class _Schedules:
    """All schedules of some steps, as far as they can still be the best.

    Some best schedule begins each step at 0 or when another ends, so only these moments are tried, and at each of them
    every choice of steps to begin, none included.
    """

    def __init__(self, seconds: Mapping[str, float], slots: int, bound: float) -> None:
        self._seconds, self._slots, self._bound = seconds, slots, bound
        self._children: dict[str, list[str]] = {step: [] for step in seconds}
        for step in seconds:
            if step:
                self._children[parent(step)].append(step)
        self._kinds = {step: self._kind(step) for step in seconds}
        self._tails = {step: self._tail(step) for step in seconds}
        self._seen: dict[Any, float] = {}
        self._best = sum(seconds.values())

    def best(self) -> float:
        self._begin(0.0, (), (BASELINE,), self._best, None)
        return self._best

    def _kind(self, step: str) -> Any:
        """Equal for steps that are the same for a schedule: they, and all below them, take equal times."""
        return (self._seconds[step], tuple(sorted(self._kind(child) for child in self._children[step])))

    def _tail(self, step: str) -> float:
        """The longest path from the step's start."""
        return self._seconds[step] + max((self._tail(child) for child in self._children[step]), default=0.0)

    def _begin(self, now: float, running: Running, ready: tuple[str, ...], left: float, last: Any) -> None:
        """Try all ways on from a moment at which steps can begin.

        Args:
            now: Seconds since the beginning.
            running: What is under way.
            ready: The steps that can begin.
            left: Seconds of all steps that have not begun.
            last: The kind of step that was begun last at this moment: of equal choices in another order, one is tried.
        """
        if not running and not ready:
            self._best = min(self._best, now)
            return
        if not self._hopeful(now, running, ready, left, last):
            return
        if len(running) < self._slots:
            different = {self._kinds[step]: step for step in ready if last is None or self._kinds[step] <= last}
            for kind in sorted(different, reverse=True):
                step = different[kind]
                rest = list(ready)
                rest.remove(step)
                took = self._seconds[step]
                self._begin(now, (*running, (now + took, step)), tuple(rest), left - took, kind)
        if running:
            end = min(running)[0]
            ended = [step for at, step in running if at <= end + 1e-9]
            freed = [child for step in ended for child in self._children[step]]
            self._begin(end, tuple(it for it in running if it[1] not in ended), (*ready, *freed), left, None)

    def _hopeful(self, now: float, running: Running, ready: tuple[str, ...], left: float, last: Any) -> bool:
        """Whether this can become better than the best so far, and was not reached as early before."""
        after = [end + self._tails[step] - self._seconds[step] for end, step in running]
        path = max([*after, *(now + self._tails[step] for step in ready)])
        work = now + (left + sum(end - now for end, _ in running)) / self._slots
        if max(path, work) >= self._best - 1e-9 or self._best <= self._bound + 1e-9:
            return False
        under_way = sorted((round(end - now, 6), self._kinds[step][1]) for end, step in running)
        state = (tuple(under_way), tuple(sorted(self._kinds[step] for step in ready)), last)
        if self._seen.get(state, float("inf")) <= now + 1e-9:
            return False
        self._seen[state] = now
        return True
