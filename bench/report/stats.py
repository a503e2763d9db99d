"""Intervals of means and tests of differences between methods.

Two things vary: the training run, with its seed, and the sample of test items. A mean's interval is over seeds, which
share the items. A difference between two methods is paired, because for one seed both train on the same data in the
same order, and both answer the same items. Its variance is that between seeds plus that of the items.

Degrees of freedom follow Welch and Satterthwaite. They are close to S - 1 when seeds dominate the variance, and large
when test items do. A bootstrap over three seeds is too optimistic: in simulation it called up to a third of equal
methods different.

With fewer than two seeds in common, the variance between seeds is taken from the methods of the same table that have
several. This assumes that all methods vary alike; a method that varies more looks more certain than it is. Without such
methods the test covers the items only, and its result is about these two runs, not about their methods.

Symbols: S seeds. Values are in percent or in points, outcomes from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import nct, norm
from scipy.stats import t as student

Outcomes = Mapping[str, Sequence[float]]  # by task, in the test's order: 1 right, 0 wrong, or in between

LEVEL = 0.95
POWER = 0.8
UNPAIRED = "a paired test needs the same seeds and the same items on both sides."


@dataclass(frozen=True)
class Mean:
    """A mean over seeds in percent, and half of its 95% interval.

    Attributes:
        over: The source of the interval: "seeds", or "items" with a single seed.
    """

    value: float
    half_width: float
    over: str
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half_width:.1f}"

    def interval_of_another(self, seeds: int) -> float:
        """Return half of the interval in which another mean falls in 95% of cases.

        The other mean is over this many seeds.
        """
        return self.half_width * math.sqrt(1 + self.seeds / seeds)


def mean_over_seeds(outcomes: Sequence[Outcomes]) -> Mean:
    """Return the mean over tasks and seeds, with its interval.

    The interval is from Student's t over seeds, or from the items' standard error with one seed.
    """
    means = [100 * _mean(run) for run in outcomes]
    value, seeds = float(np.mean(means)), len(means)
    if seeds > 1:
        return Mean(value, half_width(means), "seeds", seeds)
    error = 100 * math.sqrt(_item_variance(list(outcomes[0].values())))
    return Mean(value, error * float(norm.ppf((1 + LEVEL) / 2)), "items", 1)


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95% interval of the mean of two or more runs' values.

    The interval is by Student's t.
    """
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return error * float(student.ppf((1 + LEVEL) / 2, len(values) - 1))


@dataclass(frozen=True)
class Spread:
    """Variance between seeds of a run's mean over tasks, and its degrees of freedom.

    Computed from scores as fractions, from 0 to 1, not in percent.
    """

    variance: float
    freedom: int


def spread_over_seeds(methods: Iterable[Sequence[Outcomes]]) -> Spread | None:
    """Return the variance between seeds, pooled over the methods with several.

    Returns None without such a method.

    Args:
        methods: Outcomes by method and seed.
    """
    several = [[_mean(run) for run in runs] for runs in methods if len(runs) > 1]
    if not several:
        return None
    freedom = sum(len(means) - 1 for means in several)
    return Spread(float(sum(np.var(means) * len(means) for means in several)) / freedom, freedom)


@dataclass(frozen=True)
class Difference:
    """The difference of two methods' means over tasks, second less first, in points.

    Attributes:
        low, high: Ends of the 95% interval.
        p: Two-sided.
        items_only: Whether the variance between seeds is unknown.
        error: Standard error of the value, in points.
        freedom: Degrees of freedom of the error.
        effect: Cohen's h of the two means, 2 asin √b - 2 asin √a: 0.2 is small, 0.5 medium, 0.8 large.
    """

    value: float
    low: float
    high: float
    p: float
    items_only: bool
    error: float
    freedom: float
    effect: float

    @property
    def smallest(self) -> float:
        """The smallest difference, in points, that a test shows.

        The test is two-sided at 5%, and shows the difference in 80% of such experiments. It is the minimum detectable
        effect (t(0.975, ν) + t(0.8, ν)) · standard error (Bloom 1995).
        """
        return self.error * float(student.ppf((1 + LEVEL) / 2, self.freedom) + student.ppf(POWER, self.freedom))

    def power_at(self, effect: float, bound: float = 0.0) -> float:
        """Return how often a test against `bound` decides if the true difference is `effect`, both in points.

        The test is two-sided at 5%. Its statistic has the noncentral t distribution.
        """
        if not self.error:
            return float(effect != bound)
        limit = float(student.ppf((1 + LEVEL) / 2, self.freedom))
        shift = (effect - bound) / self.error
        return float(nct.sf(limit, self.freedom, shift) + nct.cdf(-limit, self.freedom, shift))

    def p_against(self, bound: float) -> float:
        """Return the two-sided p of the difference being `bound` points.

        With a negative bound this is a test of non-inferiority: "no worse by more than m" is shown if the value is
        above -m and this p is small for -m, and refuted if it is below.
        """
        if not self.error:
            return float(self.value == bound)
        return 2 * float(student.sf(abs(self.value - bound) / self.error, self.freedom))


def compare(first: Sequence[Outcomes], second: Sequence[Outcomes]) -> Difference:
    """Return the paired difference of two methods.

    Args:
        first: Outcomes by seed.
        second: Outcomes for the same seeds in the same order.

    Raises:
        ValueError: the two did not answer the same items for the same number of seeds.
    """
    if len(first) != len(second):
        raise ValueError(UNPAIRED)
    by_seed = [_mean(b) - _mean(a) for a, b in zip(first, second, strict=True)]
    seeds = len(by_seed)
    of_seeds = float(np.var(by_seed, ddof=1)) / seeds if seeds > 1 else 0.0
    return _difference(first, second, of_seeds, max(1, seeds - 1), items_only=seeds == 1)


def compare_apart(first: Sequence[Outcomes], second: Sequence[Outcomes], spread: Spread) -> Difference:
    """Return the difference of two methods with fewer than two seeds in common.

    It is paired over the items, and treats the runs as independent.

    Args:
        first: Outcomes by seed.
        second: Outcomes by seed.
        spread: Variance between seeds.

    Raises:
        ValueError: they did not answer the same items.
    """
    of_seeds = spread.variance * (1 / len(first) + 1 / len(second))
    return _difference(first, second, of_seeds, spread.freedom, items_only=False)


def _difference(
    first: Sequence[Outcomes], second: Sequence[Outcomes], of_seeds: float, seed_freedom: int, items_only: bool
) -> Difference:
    """Return the difference, given the variance that comes from the seeds.

    That of the items is added.
    """
    if any(_shape(run) != _shape(first[0]) for run in (*first, *second)):
        raise ValueError(UNPAIRED)
    by_task = [
        np.mean([run[task] for run in second], 0) - np.mean([run[task] for run in first], 0) for task in first[0]
    ]  # each [items]
    of_items = _item_variance(by_task)
    means = [float(np.mean([_mean(run) for run in runs])) for runs in (first, second)]
    value, error = 100 * (means[1] - means[0]), 100 * math.sqrt(of_items + of_seeds)
    effect = 2 * float(np.arcsin(np.sqrt(means[1])) - np.arcsin(np.sqrt(means[0])))
    if not error:
        return Difference(value, value, value, float(value == 0), items_only, 0.0, 1.0, effect)
    item_freedom = sum(len(difference) - 1 for difference in by_task)
    freedom = (of_items + of_seeds) ** 2 / (of_items**2 / item_freedom + of_seeds**2 / seed_freedom)
    p = 2 * float(student.sf(abs(value) / error, freedom))
    half = error * float(student.ppf((1 + LEVEL) / 2, freedom))
    return Difference(value, value - half, value + half, p, items_only, error, freedom, effect)


def _mean(run: Outcomes) -> float:
    """Return the mean over tasks of the means of their items."""
    return float(np.mean([np.mean(rights) for rights in run.values()]))


def _item_variance(tasks: Sequence[Sequence[float]]) -> float:
    """Return the variance of `_mean` that comes from the sample of items."""
    variances = [np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.0 for values in tasks]
    return float(sum(variances)) / len(variances) ** 2


def _shape(outcomes: Outcomes) -> dict[str, int]:
    return {task: len(rights) for task, rights in outcomes.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's correction for several tests, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
