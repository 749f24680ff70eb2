"""Which strategy to walk next, from what the steps of others have scored: best first, with room for doubt.

The score of a step is that of the step before it, plus a gain. A gain is a sum of effects: of the optimizer, of the pair of
the optimizer and the one before it, of the pair with the first one, of how often it came before, of the length, and one of
the step's own. All are Gaussian, so the scores of all steps are a Gaussian process over the trie of prefixes, and what was
observed, with noise, tells of what was not. How large each kind of effect is follows from the marginal likelihood (Rasmussen
and Williams, "Gaussian Processes for Machine Learning", 2006, chapter 5). The strategy that is walked next is the one with
the largest expected improvement over the best step so far, anywhere on its path, for each step that it costs (Mockus, "On
Bayesian Methods for Seeking the Extremum", 1975; per cost: Snoek, Larochelle and Adams, "Practical Bayesian Optimization of
Machine Learning Algorithms", 2012), estimated from draws of the posterior. What is under way counts as if it gave what is
expected (as in Ginsbourger, Le Riche and Carraro, "Kriging is Well-Suited to Parallelize Optimization", 2010), so that
trials at a time go different ways.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bt_ray.strategy import BASELINE, SEPARATOR, every, prefixes

Array = NDArray[np.float64]
KINDS = ("optimizer", "pair", "first", "repetition", "length", "own")
DRAWS = 256
"""Of the posterior, for one decision."""
FITS = 120
"""Sizes of effects that are tried."""
SPREADS = (8.0, 8.0, 8.0, 6.0, 4.0, 2.0)
"""Prior medians of the standard deviations of these kinds of effects, in percent of score."""
NOISE = 2.0
"""Prior median of the noise's."""
DOUBT = 1.0
"""Standard deviation of the logarithm of each of them, in the prior."""
JITTER = 1e-4
"""Added to variances, far below any noise, so that rounding leaves no negative one."""
REPEATS = 3
"""A repetition beyond it is like the last."""


@dataclass(frozen=True)
class _Fit:
    """Sizes of effects and of the noise, as standard deviations."""

    effects: tuple[float, ...]
    noise: float


class StrategySearch:
    """A search over the strategies of some optimizers.

    Args:
        optimizers: Their keys.
        max_length: Steps of a strategy, at most.
        seed: Of the draws: the same calls give the same answers.
    """

    def __init__(self, optimizers: Sequence[str], max_length: int, *, seed: int = 0) -> None:
        self._nodes = [BASELINE, *every(optimizers, max_length)]
        self._index = {prefix: number for number, prefix in enumerate(self._nodes)}
        self._paths = [[self._index[step] for step in _steps(prefix)] for prefix in self._nodes]
        self._alike = [_covariance(self._nodes, kind) for kind in KINDS]
        self._scores: dict[int, float] = {}
        self._failed: set[int] = set()
        self._seed = seed
        self._posterior: tuple[Array, Array] | None = None

    def observed(self, prefix: str, score: float) -> None:
        """A step has this score, in percent; `""` is the baseline."""
        self._scores[self._index[prefix]] = score
        self._posterior = None

    def failed(self, prefix: str) -> None:
        """A step cannot be computed, and nothing below it."""
        self._failed.add(self._index[prefix])

    def suggest(self, under_way: Collection[str] = (), steps_left: int | None = None) -> str | None:
        """The strategy to walk next; None if there is none.

        Args:
            under_way: Strategies that are walked now.
            steps_left: New steps that it may take, at most.
        """
        promised = {step for strategy in under_way for step in self._paths[self._index[strategy]]} - self._scores.keys()
        costs = self._costs(promised, steps_left)
        if not costs:
            return None
        mean, covariance = self._believed(promised)
        known = [*self._scores, *promised, 0]
        best = max(mean[number] for number in known)
        draws = self._draws(mean, covariance)
        gains = np.maximum(draws - best, 0.0)
        gains[:, known] = 0.0
        worth = {number: gains[:, self._paths[number]].max(axis=1).mean() / cost for number, cost in costs.items()}
        spread = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        chosen = max(costs, key=lambda number: (worth[number], (mean[number] + spread[number]) / costs[number], -number))
        return self._nodes[chosen]

    def expected(self, prefix: str) -> tuple[float, float]:
        """What is believed of a step's true score: mean and standard deviation."""
        mean, covariance = self._believed(set())
        number = self._index[prefix]
        return float(mean[number]), float(np.sqrt(max(covariance[number, number], 0.0)))

    def best(self) -> str:
        """The step with the best score that is believed of those that were observed: a lucky one counts for less."""
        if not self._scores:
            return BASELINE
        mean, _ = self._believed(set())
        return self._nodes[max(self._scores, key=lambda number: (mean[number], -number))]

    def _costs(self, promised: set[int], steps_left: int | None) -> dict[int, int]:
        """The steps that each strategy costs that may be walked."""
        costs = {}
        for number, path in enumerate(self._paths):
            if number == 0 or number in self._scores or number in promised or self._failed.intersection(path):
                continue
            cost = sum(step not in self._scores and step not in promised for step in path)
            if steps_left is None or cost <= steps_left:
                costs[number] = cost
        return costs

    def _believed(self, promised: set[int]) -> tuple[Array, Array]:
        """Mean and covariance of all true scores; what is promised counts as if it were as expected."""
        if self._posterior is None:
            self._posterior = self._conditioned(dict(self._scores))
        if not promised:
            return self._posterior
        mean, _ = self._posterior
        return self._conditioned({**self._scores, **{number: float(mean[number]) for number in promised}})

    def _conditioned(self, scores: dict[int, float]) -> tuple[Array, Array]:
        base = scores.get(0, min(scores.values(), default=0.0))
        seen = [number for number in scores if number != 0]
        fit = self._fitted(seen, np.array([scores[number] - base for number in seen]))
        prior = sum(size**2 * alike for size, alike in zip(fit.effects, self._alike, strict=True))
        assert isinstance(prior, np.ndarray)
        if not seen:
            return np.full(len(self._nodes), base), prior
        gained = np.array([scores[number] - base for number in seen])
        # The baseline is measured with noise too, which all differences to it share.
        within = prior[np.ix_(seen, seen)] + fit.noise**2 * (np.eye(len(seen)) + 1.0)
        solved = np.linalg.solve(within, np.column_stack([gained, prior[seen]]))
        return base + prior[:, seen] @ solved[:, 0], prior - prior[:, seen] @ solved[:, 1:]

    def _fitted(self, seen: list[int], gained: Array) -> _Fit:
        """The most plausible sizes of effects: the best of some draws of the prior, improved one by one."""
        alike = [kind[np.ix_(seen, seen)] for kind in self._alike]
        medians = np.array([*SPREADS, NOISE])

        def plausible(doubt: Array) -> float:
            return _log_likelihood(gained, medians * np.exp(DOUBT * doubt), alike) - 0.5 * float(doubt @ doubt)

        chance = np.random.default_rng(self._seed)
        drawn = [np.zeros(len(medians)), *chance.normal(size=(FITS, len(medians)))]
        best = max(drawn, key=plausible)
        for step in (1.0, 0.5, 0.25):
            for kind in np.eye(len(medians)):
                best = max((best, best + step * kind, best - step * kind), key=plausible)
        sizes = medians * np.exp(DOUBT * best)
        return _Fit(tuple(float(size) for size in sizes[:-1]), float(sizes[-1]))

    def _draws(self, mean: Array, covariance: Array) -> Array:
        chance = np.random.default_rng([self._seed, len(self._scores)])
        root = np.linalg.cholesky(covariance + JITTER * np.eye(len(mean)))
        return np.asarray(mean + chance.normal(size=(DRAWS, len(mean))) @ root.T)


def _log_likelihood(gained: Array, sizes: Array, alike: Sequence[Array]) -> float:
    if not len(gained):
        return 0.0
    within = sum(size**2 * kind for size, kind in zip(sizes, alike, strict=False)) + sizes[-1] ** 2 * (
        np.eye(len(gained)) + 1.0
    )
    _, determinant = np.linalg.slogdet(within)
    return float(-0.5 * (gained @ np.linalg.solve(within, gained) + determinant))


def _steps(prefix: str) -> list[str]:
    return prefixes(prefix) if prefix else []


def _covariance(nodes: Sequence[str], kind: str) -> Array:
    """How much of one kind of effect the scores of each two steps share."""
    effects: dict[object, int] = {}
    rows = [[effects.setdefault(_effect(step, kind), len(effects)) for step in _steps(prefix)] for prefix in nodes]
    counts = np.zeros((len(nodes), len(effects) or 1))
    for number, row in enumerate(rows):
        for effect in row:
            counts[number, effect] += 1.0
    return np.asarray(counts @ counts.T)


def _effect(prefix: str, kind: str) -> object:
    keys = prefix.split(SEPARATOR)
    match kind:
        case "optimizer":
            return keys[-1]
        case "pair":
            return tuple(keys[-2:])
        case "first":
            return keys[0], keys[-1], len(keys) > 1
        case "repetition":
            return keys[-1], min(keys[:-1].count(keys[-1]), REPEATS)
        case "length":
            return len(keys)
    return prefix
