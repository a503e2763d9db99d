"""Which differences are real.

Two things vary: the training run, seen by its seed, and the items that the test happens to have. A mean's interval is
over seeds, which share the items. A difference between two methods is paired, because both train on the same data order
for a seed and answer the same items: it is tested by a bootstrap that draws seeds and, within each task, items. With
seeds in single figures that test is a little too sure of itself (it sees (S-1)/S of the variance between S seeds); with
one seed it knows of the items only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

Outcomes = dict[str, list[int]]  # task -> 1 right, 0 wrong, in the test's order

RESAMPLES = 4000  # p-values down to 5e-4, and 95% limits that move by a few hundredths of a point
LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds in percent, and half its 95% interval; `over` says what the interval knows of."""

    value: float
    half_width: float
    over: str  # "seeds", or "items" where there is one seed
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half_width:.1f}"

    def interval_of_another(self, seeds: int) -> float:
        """Half the interval in which another mean, over so many seeds, falls in 95% of cases if nothing has changed."""
        return self.half_width * math.sqrt(1 + self.seeds / seeds)


def mean_over_seeds(outcomes: Sequence[Outcomes]) -> Mean:
    """Mean over tasks and seeds of the accuracy: Student's t over seeds; with one seed, the items' standard error."""
    means = [100 * float(np.mean([np.mean(rights) for rights in run.values()])) for run in outcomes]
    value, seeds = float(np.mean(means)), len(means)
    if seeds > 1:
        error = float(np.std(means, ddof=1)) / math.sqrt(seeds)
        return Mean(value, error * float(student.ppf((1 + LEVEL) / 2, seeds - 1)), "seeds", seeds)
    variances = [np.var(rights) / len(rights) for rights in outcomes[0].values()]
    error = 100 * math.sqrt(sum(variances)) / len(variances)
    return Mean(value, 1.96 * error, "items", 1)


@dataclass(frozen=True)
class Difference:
    """Of two methods' means over tasks, second less first, in points; p is two-sided."""

    value: float
    low: float
    high: float
    p: float


def compare(first: Sequence[Outcomes], second: Sequence[Outcomes]) -> Difference:
    """The paired difference of two methods, given the outcomes of each for the same seeds in the same order.

    A hierarchical bootstrap: seeds are drawn with replacement, then items within each task, the same for both methods.

    Raises:
        ValueError: the two did not answer the same items for the same number of seeds.
    """
    if len(first) != len(second) or any(_shape(a) != _shape(b) for a, b in zip(first, second, strict=True)):
        raise ValueError("a paired test needs the same seeds and the same items on both sides.")
    rng = np.random.default_rng(0)
    seeds, tasks = len(first), list(first[0])
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds  # [R, S]
    observed, drawn = 0.0, np.zeros(RESAMPLES)
    for task in tasks:
        difference = np.array([b[task] for b in second], float) - np.array([a[task] for a in first], float)  # [S, n]
        # Items whose outcomes differ alike over all seeds are one kind, and drawing items is drawing kinds: the same
        # distribution from tens of numbers instead of thousands.
        kinds, counts = np.unique(difference, axis=1, return_counts=True)  # [S, K], [K]
        n = difference.shape[1]
        kind_weights = rng.multinomial(n, counts / n, RESAMPLES) / n  # [R, K]
        observed += difference.mean() / len(tasks)
        drawn += ((kind_weights @ kinds.T) * seed_weights).sum(1) / len(tasks)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p = min(1.0, 2 * (int(tail) + 1) / (RESAMPLES + 1))
    return Difference(100 * float(observed), 100 * float(low), 100 * float(high), p)


def _shape(outcomes: Outcomes) -> dict[str, int]:
    return {task: len(rights) for task, rights in outcomes.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of several tests: adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
