"""How sure a difference between programs is: intervals of their scores, and tests of the winner against the others.

Programs that answered the same examples are compared, example by example; others are not. The test flips the signs of the
differences at random (E. J. G. Pitman, Significance tests which may be applied to samples from any populations, 1937):
were two programs equally good, each difference would as likely have the other sign.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bt_ray.run_dir.results import Candidate, SweepResult

RESAMPLES = 9_999
LEVEL = 0.95
Scores = Sequence[float]


@dataclass(frozen=True)
class Interval:
    """Where a program's true score lies, in percent, with a confidence of 95 %."""

    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """The winner against another program, on the same examples.

    Attributes:
        difference: Of their scores, in points of percent; positive if the winner is better.
        wins: Examples that the winner does better.
        losses: Examples that it does worse.
        p_value: How likely a difference as large would be if they were equally good, corrected for the number of tests.
    """

    difference: float
    wins: int
    losses: int
    p_value: float

    @property
    def is_sure(self) -> bool:
        return self.difference > 0 and self.p_value <= 1 - LEVEL


def interval(scores: Scores, seed: int = 0) -> Interval | None:
    """The interval of a mean score by the bootstrap over examples (B. Efron, Bootstrap methods, 1979; its percentiles).

    Args:
        scores: The metric's value for each example, from 0 to 1.
        seed: Of the resampling.

    Returns:
        None where all scores are alike, or there is one: resampling them tells nothing.
    """
    if len(set(scores)) < 2:
        return None
    values = np.asarray(scores, dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(100 * float(low), 100 * float(high))


def p_value(differences: Scores, seed: int = 0) -> float:
    """The two-sided p-value of the sign-flip test of a mean difference of 0.

    It is exact where all differences that are not 0 have one size, as with metrics that are right or wrong: then it is
    McNemar's test. Otherwise the signs are flipped at random, which never gives less than one in `RESAMPLES + 1`.
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    if not len(values):
        return 1.0
    sizes = np.abs(values)
    if np.allclose(sizes, sizes[0], rtol=1e-9, atol=0):
        return _sign_test(int((values > 0).sum()), len(values))
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(RESAMPLES, len(values)))
    observed = abs(values.sum())
    as_large = int((np.abs(signs @ values) >= observed * (1 - 1e-12)).sum())
    return (as_large + 1) / (RESAMPLES + 1)


@lru_cache(maxsize=4096)
def _sign_test(positive: int, of: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(positive, of).pvalue)


def correct_p_values(p_values: Sequence[float], *, tests: int | None = None) -> list[float]:
    """Holm's correction (S. Holm, A simple sequentially rejective multiple test procedure, 1979), in the given order.

    Args:
        p_values: Of the tests that were made.
        tests: How many the most striking of them was picked from, if more. Where the winner was picked by the same
            examples, that is one for each pair of programs: any other could have won.
    """
    of_each = (tests or len(p_values)) / max(1, len(p_values))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    given, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank) * of_each))
        given[index] = largest
    return given


def compare(winner: Scores, others: Mapping[str, Scores], *, picked_from: int | None = None) -> dict[str, Compared]:
    """The winner against each of the others.

    Args:
        winner: Its score for each example.
        others: Those of the others, for the same examples, by name.
        picked_from: The number of programs that these very examples picked the winner from, so that it may be ahead by luck;
            None if others did.
    """
    mine: NDArray[np.float64] = np.asarray(winner, dtype=float)
    differences = {name: mine - np.asarray(theirs, dtype=float) for name, theirs in others.items()}
    tests = None if picked_from is None else picked_from * (picked_from - 1) // 2
    p_values = correct_p_values([p_value(each.tolist()) for each in differences.values()], tests=tests)
    return {
        name: Compared(100 * float(each.mean()), int((each > 0).sum()), int((each < 0).sum()), p)
        for (name, each), p in zip(differences.items(), p_values, strict=True)
    }


@dataclass(frozen=True)
class Verdict:
    """The winner of a sweep against the best programs of its other strategies.

    Attributes:
        on_testset: Whether they are compared on the testset, which chose nothing, or on the valset, which chose the winner.
        examples: How many.
        winner: The winner.
        others: The other programs, the best first, each with how the winner compares.
        incomparable: How many more there are, which answered other examples.
    """

    on_testset: bool
    examples: int
    winner: Candidate
    others: tuple[tuple[Candidate, Compared], ...]
    incomparable: int = 0

    @property
    def sentence(self) -> str:
        """Whether the winner can be told from the runner-up, and from how many programs nobody can tell."""
        return " ".join(filter(None, (self._of_the_runner_up, self._of_the_incomparable)))

    @property
    def _of_the_incomparable(self) -> str:
        if not self.incomparable:
            return ""
        programs = "1 other program, which was" if self.incomparable == 1 else f"{self.incomparable} others, which were"
        how = "tested" if self.on_testset else "validated"
        return f"The winner cannot be compared with {programs} {how} on other examples."

    @property
    def _of_the_runner_up(self) -> str:
        where = f"{self.examples} {'test' if self.on_testset else 'validation'} examples"
        if not self.others:
            return ""
        second, against = self.others[0]
        name = f'"{second.prefix or "baseline"}"{f" [{second.variant}]" if second.variant else ""}'
        wins = f"it does better on {against.wins} of {where} and worse on {against.losses}"
        if against.is_sure:
            return f"The winner is better than the runner-up, {name}: {wins} (p = {against.p_value:.2g})."
        if against.difference < 0 and against.p_value <= 1 - LEVEL:
            return f"The runner-up, {name}, is better than the winner on examples that chose neither: {wins}."
        told = f"The winner cannot be told from the runner-up, {name}: {wins} (p = {against.p_value:.2g})."
        worse = [candidate for candidate, compared in self.others if compared.is_sure]
        if not worse:
            return told
        return f"{told} It is better than {len(worse)} of the {len(self.others)} others."


def verdict(result: SweepResult) -> Verdict | None:
    """The winner against the best program of each other strategy; None if there is nothing to compare it with."""
    if (winner := result.best) is None:
        return None
    programs = {candidate.program: candidate for trial in result.trials if (candidate := trial.best) is not None}
    on_testset = bool(winner.test_example_scores)

    def scores(candidate: Candidate) -> tuple[float, ...]:
        return candidate.test_example_scores if on_testset else candidate.example_scores

    def is_comparable(candidate: Candidate) -> bool:
        ours, theirs = (winner.testset, candidate.testset) if on_testset else (winner.valset, candidate.valset)
        return ours == theirs and len(scores(candidate)) == len(scores(winner))

    mine = scores(winner)
    scored = [other for program, other in programs.items() if program != winner.program and scores(other)]
    others = sorted(filter(is_comparable, scored), key=lambda other: other.rank_key)
    if not scored or not mine:
        return None
    candidates = len({candidate.program for candidate in result.candidates})
    picked_from = None if on_testset else candidates
    against = compare(mine, {other.program: scores(other) for other in others}, picked_from=picked_from)
    pairs = tuple((other, against[other.program]) for other in others)
    return Verdict(on_testset, len(mine), winner, pairs, len(scored) - len(others))
