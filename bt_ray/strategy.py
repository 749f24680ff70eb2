"""Strategies: sequences of optimizer keys, written as DSPy writes them: `"p -> w -> p"`.

A step is named by its prefix: `"p -> w"` is the second step of `"p -> w -> p"`. The empty prefix is the baseline.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import product
from typing import Any, TypeVar

from bt_ray.errors import ConfigError, nearest

SEPARATOR = " -> "
BASELINE = ""


def parse(strategy: str, known_keys: Iterable[str]) -> tuple[str, ...]:
    """The optimizer keys of `strategy`, in order.

    Raises:
        ConfigError: The strategy is empty, not written as DSPy writes it, or names an optimizer that the task lacks.
    """
    known = list(known_keys)
    if not strategy.strip():
        raise ConfigError('A strategy is empty. Write optimizer keys joined by " -> ", for example "p -> w".')
    keys = tuple(strategy.split(SEPARATOR))
    written_right = SEPARATOR.join(part.strip() for part in strategy.split("->") if part.strip())
    if written_right != strategy:
        raise ConfigError(f'Strategy "{strategy}" is not written as DSPy reads it: write "{written_right}".')
    for key in keys:
        if key not in known:
            raise ConfigError(
                f'Strategy "{strategy}": the task has no optimizer {key!r}.{nearest(key, known)} '
                f"Its optimizers: {', '.join(known)}."
            )
    return keys


def prefixes(strategy: str) -> list[str]:
    """The steps of `strategy`, shortest first: `["p", "p -> w"]` for `"p -> w"`."""
    keys = strategy.split(SEPARATOR)
    return [SEPARATOR.join(keys[:end]) for end in range(1, len(keys) + 1)]


def length(prefix: str) -> int:
    """The number of steps that lead to `prefix`; 0 for the baseline."""
    return len(prefix.split(SEPARATOR)) if prefix else 0


def check_distinct(strategies: Iterable[str]) -> None:
    """Raises `ConfigError` if a strategy is given twice."""
    seen: set[str] = set()
    for strategy in strategies:
        if strategy in seen:
            raise ConfigError(f'Strategy "{strategy}" is given twice.')
        seen.add(strategy)


def parent(prefix: str) -> str:
    """The step before `prefix`; the baseline for a single step."""
    return prefix.rpartition(SEPARATOR)[0]


def all_prefixes(strategies: Iterable[str]) -> list[str]:
    """The steps of all strategies, each once, shorter ones first, else in the order given."""
    return sorted(dict.fromkeys(prefix for strategy in strategies for prefix in prefixes(strategy)), key=length)


def steps_to_come(steps: Iterable[str]) -> dict[str, int]:
    """How many of these steps the longest strategy through each of them has from there on, itself included.

    Args:
        steps: The steps of some strategies, each with all before it.
    """
    found: dict[str, int] = {}
    for step in sorted(steps, key=length, reverse=True):
        found[step] = max(1, found.get(step, 0))
        if step != BASELINE:
            found[parent(step)] = max(found.get(parent(step), 0), found[step] + 1)
    return found


def every(optimizers: Sequence[str], max_length: int) -> list[str]:
    """Every strategy of these optimizers, shorter ones first."""
    lengths = range(1, max_length + 1)
    return [SEPARATOR.join(keys) for count in lengths for keys in product(optimizers, repeat=count)]


def variant_name(values: Mapping[str, Any]) -> str:
    """Names a variant of a sweep's settings by what it has of the space; `""` for nothing."""
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def step_label(prefix: str, variant: str) -> str:
    """Names a step among those of a whole sweep: its prefix, and the variant of the settings that it belongs to."""
    return f"{prefix or 'baseline'} [{variant}]" if variant else prefix


T = TypeVar("T")


def start_order(paths: Mapping[T, Sequence[str]], finished: Collection[str], trainings: Collection[str]) -> list[T]:
    """The order in which to start trials: those first that leave the earliest the paths of the trials before them.

    So as many different steps as possible are under way from the beginning. Among equals the one with the most to do comes
    first, then the one with the most trainings, then the one that was given first.

    Args:
        paths: The keys of the steps of each trial, in order.
        finished: The keys of those that are finished.
        trainings: The keys of those that fine-tune.
    """
    todo = {trial: [key for key in path if key not in finished] for trial, path in paths.items()}
    taken, order = set[str](), []

    def count_shared(trial: T) -> int:
        """How many of its steps come before the first that no trial so far has on its path."""
        steps = todo[trial]
        return next((number for number, key in enumerate(steps) if key not in taken), len(steps))

    def to_do(trial: T) -> tuple[int, int]:
        steps = todo[trial]
        return (-len(steps), -sum(key in trainings for key in steps))

    queue = [(not todo[trial], 0, to_do(trial), place, trial) for place, trial in enumerate(todo)]
    heapify(queue)
    while queue:
        nothing_left, before, most, place, trial = heappop(queue)
        if (now := count_shared(trial)) > before:  # it only grows
            heappush(queue, (nothing_left, now, most, place, trial))
            continue
        taken.update(todo[trial])
        order.append(trial)
    return order
