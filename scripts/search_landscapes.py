"""Compare `bt_ray.search` with random choice on simulated landscapes, whose best strategy is known.

    python scripts/search_landscapes.py --seeds 10

A landscape is a true score for each step of all strategies over {p, w} up to length 5, drawn at random within its family:

additive    each optimizer has its gain, which shrinks with each use; every step also costs a little
context     the gain depends on the step before, and fades with depth
deceptive   the optimizers gain little, but behind one beginning, whose first step loses, lies a large gain

In each, every step has a small variation of its own, which all that is below it inherits. Who searches sees scores with
normal noise, and may compute 40 % of the steps beside the baseline. The regret is the best true score of all steps minus the
true score of the step that is returned: in points.

The rows are: the search; the search with 4 strategies under way at a time, of which a random one is the next to end a step;
random strategies of full length, and of any length, walked until the budget ends, of which the highest score is returned;
and, as the least that can be hoped for, what the search returns when every step is computed.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from itertools import product

import numpy as np

from bt_ray.driver.search_model import StrategySearch
from bt_ray.strategy import SEPARATOR, parent, prefixes

OPTIMIZERS, MAX_LENGTH = ("p", "w"), 5
KEYS = [keys for depth in range(1, MAX_LENGTH + 1) for keys in product(OPTIMIZERS, repeat=depth)]
STEPS = [SEPARATOR.join(keys) for keys in KEYS]
BUDGET = int(0.4 * len(STEPS))
OWN_VARIATION = 0.3
"""Standard deviation of a step's own variation, in points."""

Scores = dict[str, float]


def landscape(gain: Callable[[tuple[str, ...]], float], chance: np.random.Generator) -> Scores:
    """The true scores if the last step of a strategy gains `gain`, and its own variation."""
    scores = {"": chance.uniform(30, 60)}
    for keys, step in zip(KEYS, STEPS, strict=True):
        scores[step] = scores[parent(step)] + gain(keys) + chance.normal(0, OWN_VARIATION)
    return scores


def scaled(gain: Callable[[tuple[str, ...]], float], most: float) -> Callable[[tuple[str, ...]], float]:
    """`gain`, by a factor with which the best strategy gains `most` in all. ValueError if there is no good one."""
    best = max(sum(gain(keys[:end]) for end in range(1, len(keys) + 1)) for keys in KEYS)
    if best < 3:
        raise ValueError("No strategy gains.")
    return lambda keys: gain(keys) * most / best


def shrinking_gain(chance: np.random.Generator, low: float, high: float, cost: float) -> Callable[[tuple[str, ...]], float]:
    first = {key: chance.uniform(low, high) for key in OPTIMIZERS}
    kept = {key: chance.uniform(0.3, 0.7) for key in OPTIMIZERS}
    return lambda keys: first[keys[-1]] * kept[keys[-1]] ** keys[:-1].count(keys[-1]) - cost


def additive(chance: np.random.Generator) -> Scores:
    gain = shrinking_gain(chance, 4, 12, cost=chance.uniform(0, 3))
    return landscape(scaled(gain, chance.uniform(12, 30)), chance)


def context(chance: np.random.Generator) -> Scores:
    while True:
        befores = ((), *((key,) for key in OPTIMIZERS))
        gain = gain_after(
            {(before, key): chance.normal(2, 4) for before in befores for key in OPTIMIZERS}, chance.uniform(0.6, 1)
        )
        try:
            return landscape(scaled(gain, chance.uniform(12, 30)), chance)
        except ValueError:
            continue


def gain_after(after: dict[tuple[tuple[str, ...], str], float], fade: float) -> Callable[[tuple[str, ...]], float]:
    return lambda keys: after[keys[-2:-1], keys[-1]] * fade ** (len(keys) - 1)


def deceptive(chance: np.random.Generator) -> Scores:
    while True:
        hidden = tuple(chance.choice(OPTIMIZERS, size=chance.integers(2, 4)))
        loss, jump = chance.uniform(3, 8), chance.uniform(10, 22)
        special = {hidden[:1]: -loss, hidden: jump}
        scores = landscape(gain_but(special, shrinking_gain(chance, 2, 8, cost=1)), chance)
        best = max(scores.values())
        others = max(score for step, score in scores.items() if not step.startswith(hidden[0]))
        if scores[hidden[0]] < scores[""] - 2 and others + 4 < best < scores[""] + 30:
            return scores


def gain_but(
    special: dict[tuple[str, ...], float], elsewhere: Callable[[tuple[str, ...]], float]
) -> Callable[[tuple[str, ...]], float]:
    return lambda keys: special.get(keys) or elsewhere(keys)


FAMILIES = {"additive": additive, "context": context, "deceptive": deceptive}


def draw(family: str, seed: int, sigma: float) -> tuple[Scores, Scores]:
    """The true scores of a landscape, and those that are observed."""
    chance = np.random.default_rng([list(FAMILIES).index(family), seed])
    true = FAMILIES[family](chance)
    return true, {step: score + chance.normal(0, sigma) for step, score in true.items()}


def searched(observed: Scores, seed: int, at_once: int = 1, budget: int = BUDGET) -> str:
    """The step that the search returns, with `at_once` strategies under way."""
    search, chance = StrategySearch(OPTIMIZERS, MAX_LENGTH, seed=seed), random.Random(seed)
    search.observe("", observed[""])
    done, under_way = {""}, list[str]()
    while True:
        while len(under_way) < at_once:
            planned = done.union(*map(prefixes, under_way))
            strategy = search.suggest(under_way, budget + 1 - len(planned))
            if strategy is None:
                break
            under_way.append(strategy)
        if not under_way:
            return search.best()
        nexts = [next(step for step in prefixes(strategy) if step not in done) for strategy in under_way]
        step = chance.choice(nexts)
        search.observe(step, observed[step])
        done.add(step)
        under_way = [strategy for strategy in under_way if strategy not in done]


def chosen_at_random(observed: Scores, seed: int, full_length: bool = True, budget: int = BUDGET) -> str:
    """The step with the highest score among those of random strategies."""
    chance, done = random.Random(seed), {"": observed[""]}
    while len(done) <= budget:
        size = MAX_LENGTH if full_length else chance.randint(1, MAX_LENGTH)
        for step in prefixes(SEPARATOR.join(chance.choices(OPTIMIZERS, k=size))):
            if len(done) <= budget:
                done[step] = observed[step]
    return max(done, key=lambda step: done[step])


RETURNS: dict[str, Callable[[Scores, int], str]] = {
    "search": searched,
    "search, 4 at once": lambda observed, seed: searched(observed, seed, at_once=4),
    "random, full length": chosen_at_random,
    "random, any length": lambda observed, seed: chosen_at_random(observed, seed, full_length=False),
    "every step computed": lambda observed, seed: searched(observed, seed, budget=len(STEPS)),
}


def regret(true: Scores, step: str) -> float:
    return max(true.values()) - true[step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="landscapes of each family")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--sigma", type=float, default=2.0, help="standard deviation of the noise, in points")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print(f"{BUDGET} of {len(STEPS)} steps, noise {arguments.sigma:g}, seeds {seeds[0]} to {seeds[-1]}\n")
    print(f"{'landscape':10} {'':20} {'mean regret':>11} {'90 %':>6}   regret <= sigma")
    for family in FAMILIES:
        for name, returns in RETURNS.items():
            regrets = []
            for seed in seeds:
                true, observed = draw(family, seed, arguments.sigma)
                regrets.append(regret(true, returns(observed, seed)))
            high = float(np.percentile(regrets, 90))
            good = sum(value <= arguments.sigma for value in regrets)
            print(f"{family:10} {name:20} {statistics.mean(regrets):11.2f} {high:6.2f}   {good} of {len(seeds)}", flush=True)
        print()


if __name__ == "__main__":
    main()
