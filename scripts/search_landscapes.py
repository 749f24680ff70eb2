"""How far a search over strategies gets on landscapes whose best strategy is known, next to random choice.

    python scripts/search_landscapes.py [--first-seed 1000] [--seeds 10] [--sigma 2]

Three families over {p, w}, of at most five steps, each landscape drawn from its seed: gains that add up, gains that depend
on the step before, and a deceptive one whose best strategy starts with a loss. Scores have Gaussian noise of known size, and
40 % of the trie's 62 steps may be computed. Regret is what the strategy that is returned lacks to the best one, in true
score.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, quantiles

from bt_ray.search import StrategySearch
from bt_ray.strategy import SEPARATOR, every, parent, prefixes

OPTIMIZERS, LENGTH = ("p", "w"), 5
STEPS = every(OPTIMIZERS, LENGTH)
BUDGET = int(0.4 * len(STEPS))
OWN = 0.3
"""Standard deviation of what each step gains of its own."""
Landscape = dict[str, float]


def additive(chance: random.Random) -> Landscape:
    """Each optimizer has a gain, which shrinks each time that it is used again; and each step a little of its own."""
    gain = {key: chance.uniform(2, 15) for key in OPTIMIZERS}
    shrink = {key: chance.uniform(-0.3, 0.7) for key in OPTIMIZERS}

    def gained(keys: list[str]) -> float:
        return gain[keys[-1]] * shrink[keys[-1]] ** keys[:-1].count(keys[-1]) + chance.gauss(0, OWN)

    return drawn(gained)


def dependent(chance: random.Random) -> Landscape:
    """A step's gain depends on the step before it, and shrinks with the length."""
    gain = {(before, key): chance.gauss(4, 7) for before in (None, *OPTIMIZERS) for key in OPTIMIZERS}

    def gained(keys: list[str]) -> float:
        before = keys[-2] if len(keys) > 1 else None
        return gain[before, keys[-1]] * 0.8 ** (len(keys) - 1) + chance.gauss(0, OWN)

    return drawn(gained)


def deceptive(chance: random.Random) -> Landscape:
    """One optimizer helps at once, the other loses at first, and what follows that loss gains more than anything else."""
    good, bad = chance.sample(OPTIMIZERS, 2)
    loss, reward, early = chance.uniform(3, 8), chance.uniform(15, 25), chance.uniform(4, 8)

    def gained(keys: list[str]) -> float:
        if len(keys) == 1:
            value = early if keys[0] == good else -loss
        elif keys[0] == bad and keys[-1] == good and good not in keys[:-1]:
            value = reward
        else:
            value = chance.uniform(-1.5, 0)
        return value + chance.gauss(0, OWN)

    return drawn(gained)


def drawn(gained: Callable[[list[str]], float]) -> Landscape:
    scores = {"": 30.0}
    for prefix in STEPS:
        scores[prefix] = scores[parent(prefix)] + gained(prefix.split(SEPARATOR))
    return scores


LANDSCAPES: dict[str, Callable[[random.Random], Landscape]] = {
    "gains add up": additive,
    "depend on the step before": dependent,
    "deceptive": deceptive,
}


@dataclass
class Sweep:
    """Computes steps with noise, each once, within the budget."""

    landscape: Landscape
    chance: random.Random
    sigma: float

    def __post_init__(self) -> None:
        self.scores = {"": self.landscape[""] + self.chance.gauss(0, self.sigma)}

    @property
    def left(self) -> int:
        return BUDGET - (len(self.scores) - 1)

    def walk(self, strategy: str) -> dict[str, float]:
        """What the strategy's new steps score."""
        new = [prefix for prefix in prefixes(strategy) if prefix not in self.scores][: self.left]
        found = {prefix: self.landscape[prefix] + self.chance.gauss(0, self.sigma) for prefix in new}
        self.scores |= found
        return found


def searched(sweep: Sweep, seed: int, at_a_time: int = 1) -> str:
    """What the search returns, with so many strategies under way at a time."""
    search = StrategySearch(OPTIMIZERS, LENGTH, seed=seed)
    search.observed("", sweep.scores[""])
    under_way: list[str] = []
    while True:
        while len(under_way) < at_a_time:
            promised = {step for strategy in under_way for step in prefixes(strategy)} - sweep.scores.keys()
            suggested = search.suggest(under_way, sweep.left - len(promised))
            if suggested is None:
                break
            under_way.append(suggested)
        if not under_way:
            return search.best()
        for prefix, score in sweep.walk(under_way.pop(0)).items():
            search.observed(prefix, score)


def at_random(sweep: Sweep, chance: random.Random) -> str:
    """The highest score among random strategies."""
    while sweep.left > 0:
        sweep.walk(chance.choice(STEPS))
    return max(sweep.scores, key=lambda prefix: sweep.scores[prefix])


def regrets(family: str, seed: int, sigma: float) -> dict[str, float]:
    """What each way lacks to the best strategy of one landscape."""
    landscape = LANDSCAPES[family](random.Random(f"{family} {seed}"))
    best = max(landscape.values())

    def sweep() -> Sweep:
        return Sweep(landscape, random.Random(f"noise {seed}"), sigma)

    found = {
        "search": searched(sweep(), seed),
        "search, 4 at a time": searched(sweep(), seed, at_a_time=4),
        "random": at_random(sweep(), random.Random(f"choice {seed}")),
    }
    return {way: best - landscape[prefix] for way, prefix in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--sigma", type=float, default=2.0, help="standard deviation of the noise, in percent of score")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(f"{len(STEPS)} steps, of which {BUDGET} may be computed; noise {options.sigma}; seeds {seeds[0]} to {seeds[-1]}")
    print(f"{'landscape':26} {'way':20} {'mean regret':>11} {'90th pct.':>9} {'within sigma':>12}")
    for family in LANDSCAPES:
        found = [regrets(family, seed, options.sigma) for seed in seeds]
        for way in found[0]:
            values = [regret[way] for regret in found]
            within = sum(value <= options.sigma for value in values)
            high = quantiles(values, n=10)[-1] if len(values) > 1 else values[0]
            print(f"{family:26} {way:20} {mean(values):11.2f} {high:9.2f} {within:8} of {len(values)}")


if __name__ == "__main__":
    main()
