"""DSPy's cache in a process of a sweep: what is sampled is drawn anew for each seed.

DSPy answers a request that it has seen from its cache. So sweeps, or variants, that differ in the seed alone would all have
the one draw of the first of them, and the spread over their scores would be none. With a seed other than 0, the seed becomes
part of what the cache knows a request by, wherever the temperature is not 0. Seed 0 has the answers that DSPy has without
bt_ray, and the same seed has the same answers again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SEED = "bt_ray_seed"
ASKS = ("messages", "prompt", "input")
"""What a request to a language model has one of, and one for embeddings has not."""


class SeededCache:
    """DSPy's cache, with a seed in each request that is sampled.

    Args:
        cache: DSPy's own.
        seed: The sweep's.
    """

    def __init__(self, cache: Any, seed: int) -> None:
        self._cache = cache
        self._seed = seed

    def get(self, request: Mapping[str, Any], *arguments: Any, **named: Any) -> Any:
        return self._cache.get(self._add_seed(request), *arguments, **named)

    def put(self, request: Mapping[str, Any], *arguments: Any, **named: Any) -> None:
        self._cache.put(self._add_seed(request), *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def _add_seed(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**request, SEED: self._seed} if is_sampled(request) else request


def is_sampled(request: Mapping[str, Any]) -> bool:
    """Whether the same request may get another answer: its temperature is not 0, or left to whoever answers."""
    inner = request.get("request")
    body: Mapping[str, Any] = inner if isinstance(inner, Mapping) else request
    config = body.get("config")
    given = body.get("temperature", config.get("temperature") if isinstance(config, Mapping) else None)
    return any(name in body for name in ASKS) and given != 0


@contextmanager
def draw_by_seed(seed: int) -> Iterator[None]:
    """Have this process draw what is sampled by the seed. Opens DSPy's cache, which its first reader would do otherwise."""
    import dspy

    cache = dspy.cache
    if seed == 0:
        yield
        return
    dspy.cache = seeded = SeededCache(cache, seed)
    try:
        yield
    finally:
        if dspy.cache is seeded:
            dspy.cache = cache
