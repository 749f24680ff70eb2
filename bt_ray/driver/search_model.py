"""Which strategy to try next, from the scores of the steps that are committed: pure, it starts nothing and knows no Ray.

The model. A step's score is its parent's plus a gain. A gain is a sum of effects that steps share (of the optimizer; of the
optimizer and the one before it; of the depth; of how often the optimizer was used before) and an effect of its own, which
everything below the step inherits. All effects are normal, and so is the noise of a score, but a step's own effect has
heavier tails: one that stands out is taken for itself, and does not make every other step look uncertain (Student's t,
fitted by expectation maximization: "Robust Statistical Modeling Using the t Distribution", Lange, Little and Taylor, 1989).
How large the effects of each kind are is not known: the answers of a fixed sample of settings are averaged, each weighed by
its marginal likelihood ("Practical Bayesian Optimization of Machine Learning Algorithms", Snoek, Larochelle and Adams,
2012).

The rule. While not much more is done than left, it explores: it takes the most promising step of the shortest that are left.
So each beginning is tried, also below a loss, and short strategies are the beginnings of many. After that it takes the step
on the way to the strategy with the largest expected improvement on the best one ("Efficient Global Optimization of Expensive
Black-Box Functions", Jones, Schonlau and Welch, 1998). Steps under way count as if they had come out as expected ("Kriging
Is Well-Suited to Parallelize Optimization", Ginsbourger, Le Riche and Carraro, 2010).
"""

import itertools
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from bt_ray.strategy import SEPARATOR, prefixes

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

EXPLORED = 1.2
"""It explores while fewer steps are done than this times those left, so in a bit more than the first half."""

SCALES = {
    "any": (2.5, 0.8),
    "optimizer": (2.5, 0.8),
    "after": (1.5, 1.0),
    "depth": (1.0, 1.0),
    "use": (1.5, 1.0),
    "optimizer's use": (1.0, 1.0),
    "own": (1.0, 0.8),
    "noise": (2.0, 0.5),
}
"""How large effects may be: the median of their standard deviation, in points, and the spread of its logarithm."""

BASELINE_SCALE = 10.0
"""How far the baseline's true score may be from the one observed, in points: much further than noise carries."""

SETTINGS = 32
"""How many settings of the scales are averaged."""

TAILS = 3.0
"""Degrees of freedom of a step's own effect."""

ROUNDS = 3
"""Of the fit of the tails."""

MANY = 100
"""With more scores than these the likeliest setting stands for all."""

LARGEST_SCORE = 1e9
"""Scores beyond it count as it, so that squares stay finite."""

BASELINE_ROW = 0


class StrategySearch:
    """Suggests strategies, and tells which step is best, from what was observed.

    Args:
        optimizers: The task's optimizer keys.
        max_length: How many steps a strategy may have.
        seed: Of the sample of scales. The same calls give the same answers.
    """

    def __init__(self, optimizers: Sequence[str], max_length: int, *, seed: int = 0) -> None:
        self._model = _Model(optimizers, max_length, seed)
        self._scores: dict[int, float] = {}
        self._failed: set[int] = set()

    def observe(self, prefix: str, score: float) -> None:
        """A step is committed. A later score of the same step replaces it; one that is not finite tells nothing.

        Raises:
            ValueError: No strategy within the length has this step. So do all methods that take a step.
        """
        node = self._model.node(prefix)
        self._failed.discard(node)
        self._scores[node] = min(max(score, -LARGEST_SCORE), LARGEST_SCORE) if math.isfinite(score) else math.nan

    def note_failed(self, prefix: str) -> None:
        """A step cannot be computed: neither it nor anything below it is suggested."""
        self._failed.add(self._model.node(prefix))

    def suggest(self, under_way: Collection[str] = (), steps_left: int | None = None) -> str | None:
        """The strategy to walk next. Its last step is its only one that is neither observed nor under way.

        Args:
            under_way: Strategies, or steps, that are being computed, with all that leads to them.
            steps_left: How many steps may yet be computed beside those. None where nobody counts: then it explores every
                other time.

        Returns:
            None if nothing is left to compute.
        """
        model = self._model
        pending = {model.node(prefix) for strategy in under_way if strategy for prefix in prefixes(strategy)}
        pending -= self._scores.keys()
        done = [BASELINE_ROW, *self._scores, *pending]
        new = np.ones(len(model.names), bool)
        new[done] = False
        steps = new[model.path].sum(1)
        open_ = new & ~np.isin(model.path, list(self._failed)).any(1)
        if steps_left is not None:
            open_ &= steps <= steps_left
        if not open_.any():
            return None
        belief = self._belief()
        if pending:
            belief = self._belief({node: float(belief.mean[node]) for node in pending})
        computed = int((~new).sum()) - 1
        if computed < EXPLORED * steps_left if steps_left is not None else computed % 2 == 0:
            shortest = open_ & (model.depth == model.depth[open_].min())
            worth = np.where(shortest, belief.mean + belief.sd, -np.inf)
        else:
            worth = np.where(open_, belief.improvement_on(belief.mean[done].max()), -np.inf)
        way = model.path[worth.argmax()]
        return str(model.names[way[new[way]][0]])

    def expect(self, prefix: str) -> tuple[float, float]:
        """The mean and the standard deviation of what a step's true score may be."""
        node, belief = self._model.node(prefix), self._belief()
        return float(belief.mean[node]), float(belief.sd[node])

    def best(self) -> str:
        """The observed step with the highest expected score, which luck moves less than the observed one.

        Raises:
            ValueError: Nothing is observed.
        """
        mean = self._belief().mean
        nodes = [node for node, score in self._scores.items() if math.isfinite(score)] or list(self._scores)
        return self._model.names[max(sorted(nodes), key=lambda node: mean[node])]

    def _belief(self, supposed: dict[int, float] | None = None) -> "_Belief":
        known = {node: score for node, score in self._scores.items() if math.isfinite(score)} | (supposed or {})
        nodes = sorted(known)
        return self._model.belief(np.array(nodes, np.intp), np.array([known[node] for node in nodes]))


@dataclass(frozen=True)
class _Belief:
    """The mean and the standard deviation of each step's true score."""

    mean: Floats
    sd: Floats

    def improvement_on(self, score: float) -> Floats:
        """The expected improvement of each step's true score on `score`."""
        z = (self.mean - score) / self.sd
        normal = NormalDist()
        return np.asarray(self.sd * [value * normal.cdf(value) + normal.pdf(value) for value in z.tolist()], np.float64)


class _Model:
    """The trie of all strategies, and the prior of their scores. A step is a row: the baseline is the first, then by length.

    Attributes:
        names: Each step's prefix.
        depth: Each step's length.
        path: The rows of the steps that lead to each, its own the last; filled up with the baseline's in front.
    """

    def __init__(self, optimizers: Sequence[str], max_length: int, seed: int) -> None:
        steps = [keys for depth in range(max_length + 1) for keys in itertools.product(optimizers, repeat=depth)]
        rows = {keys: row for row, keys in enumerate(steps)}
        self.names = [SEPARATOR.join(keys) for keys in steps]
        self._rows = {name: row for row, name in enumerate(self.names)}
        self.depth = np.array([len(keys) for keys in steps])
        self.path = np.zeros((len(steps), max_length + 1), np.intp)
        effects: dict[tuple[str, Hashable], int] = {}
        gains = [[effects.setdefault(effect, len(effects)) for effect in _find_shared_effects(keys)] for keys in steps[1:]]
        self._shared = np.zeros((len(steps), len(effects)))  # how often each effect is in a step's score
        for keys, gain in zip(steps[1:], gains, strict=True):
            row, before = rows[keys], rows[keys[:-1]]
            self.path[row] = [*self.path[before, 1:], row]
            self._shared[row] = self._shared[before]
            self._shared[row, gain] += 1
        medians, spreads = np.array(list(SCALES.values())).T
        scales = medians * np.exp(spreads * np.random.default_rng(seed).standard_normal((SETTINGS, len(SCALES))))
        variances = dict(zip(SCALES, scales.T**2, strict=True))
        shared = np.stack([variances[kind] for kind, _ in effects], axis=1)
        self._settings = _Settings(shared, variances["own"], variances["noise"])

    def node(self, prefix: str) -> int:
        if (row := self._rows.get(prefix)) is None:
            raise ValueError(f"{prefix!r} is no step of the strategies that are searched.")
        return row

    def belief(self, seen: Indices, scores: Floats) -> _Belief:
        """What the scores of the steps `seen` tell about all steps."""
        level = scores[0] if len(scores) else 0.0
        settings = self._settings
        if len(seen) > MANY:
            settings = settings.only(int(self._fit(seen[:MANY], scores[:MANY] - level, settings).weight.argmax()))
        fit = self._fit(seen, scores - level, settings)
        likely = np.flatnonzero(fit.weight > 0.01 * fit.weight.max())
        heavy = np.full(len(self.names), TAILS / (TAILS - 2))
        heavy[fit.own] = fit.tail
        heavy[BASELINE_ROW] = 0
        own, below = heavy[self.path].sum(1), _passes(self.path, fit.own) * fit.tail
        mean, square = np.zeros(len(self.names)), np.zeros(len(self.names))
        for setting, weight in zip(likely, fit.weight[likely] / fit.weight[likely].sum(), strict=True):
            shared = self._shared * settings.shared[setting]
            with_seen = shared @ self._shared[seen].T + settings.own[setting] * below @ fit.passes.T + BASELINE_SCALE**2
            expected = with_seen @ fit.solved[setting]
            variance = (shared * self._shared).sum(1) + settings.own[setting] * own + BASELINE_SCALE**2
            variance -= (with_seen @ fit.inverse[setting] * with_seen).sum(1)
            mean += weight * expected
            square += weight * (expected**2 + fit.unit[setting] * np.maximum(variance, 1e-9))
        return _Belief(mean + level, np.sqrt(np.maximum(square - mean**2, 1e-9)))

    def _fit(self, seen: Indices, scores: Floats, settings: "_Settings") -> "_Fit":
        own = np.setdiff1d(self.path[seen], [BASELINE_ROW])
        passes, tail = _passes(self.path[seen], own), np.ones(len(own))
        shared = self._shared[seen]
        fixed = (shared * settings.shared[:, None]) @ shared.T + BASELINE_SCALE**2
        fixed += settings.noise[:, None, None] * np.eye(len(seen))
        for more_rounds in reversed(range(ROUNDS)):
            covariance = fixed + settings.own[:, None, None] * (passes * tail @ passes.T)
            inverse = np.linalg.inv(covariance)
            solved = inverse @ scores
            # The square of the unit of all scales is inverse gamma with parameters 2 and 2, and is integrated out.
            shape, rate = 2 + len(seen) / 2, 2 + solved @ scores / 2
            evidence = -shape * np.log(rate) - np.linalg.slogdet(covariance)[1] / 2
            weight = np.exp(evidence - evidence.max())
            weight /= weight.sum()
            unit = rate / shape
            if more_rounds:
                explained = (solved @ passes) ** 2 / unit[:, None] - (inverse @ passes * passes).sum(1)
                tail = (TAILS + tail + tail**2 * ((weight * settings.own) @ explained)) / (TAILS + 1)
        return _Fit(own, passes, tail, weight, inverse.astype(np.float64), solved, unit)


@dataclass(frozen=True)
class _Settings:
    """Variances: of each shared effect, of a step's own and of the noise; a row for each setting."""

    shared: Floats
    own: Floats
    noise: Floats

    def only(self, row: int) -> "_Settings":
        return _Settings(self.shared[[row]], self.own[[row]], self.noise[[row]])


@dataclass(frozen=True)
class _Fit:
    """What scores tell.

    Attributes:
        own: The steps whose own effect is in one of the scores.
        passes: Whether each scored step is one of those, or below it.
        tail: How much larger than the others' the variance of each one's own effect is.
        weight: How well each setting explains the scores; the sum is 1.
        inverse: For each setting, of the scores' covariance.
        solved: Of the scores by it.
        unit: The square of the unit in which each setting is to be read.
    """

    own: Indices
    passes: Floats
    tail: Floats
    weight: Floats
    inverse: Floats
    solved: Floats
    unit: Floats


def _find_shared_effects(keys: tuple[str, ...]) -> list[tuple[str, Hashable]]:
    """The effects that the last step of `keys` shares with others, each with its kind."""
    *before, key = keys
    used = before.count(key)
    return [
        ("any", None),
        ("optimizer", key),
        ("after", (*before[-1:], key)),
        ("depth", len(keys)),
        ("use", used),
        ("optimizer's use", (key, used)),
    ]


def _passes(path: Indices, steps: Indices) -> Floats:
    """Whether each path leads over each of `steps`, as 0 or 1."""
    return np.asarray((path[:, :, None] == steps).any(1), np.float64)
