"""Which differences are real.

Two things vary: the training run, seen by its seed, and the items that the test happens to have. A mean's interval is
over seeds, which share the items. A difference between two methods is paired, because both train on the same data order
for a seed and answer the same items; its variance is that of the seeds plus that of the items, and it is held against
Student's t with as many degrees of freedom as that sum has (Welch and Satterthwaite): near S - 1 where the runs vary
most, so that three seeds that agree in sign prove little, and many where the items do. (A bootstrap of three seeds is
too sure: in a simulation it called up to a third of equal methods different.) With fewer than two seeds in common how
much runs vary is taken from methods of the same table that have several, if there are any: as if all varied alike, so
that a method that varies more than they do passes for surer than it is. Otherwise the test knows of the items only, and
is a statement about these two runs, not about their methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

Outcomes = dict[str, list[float]]  # task -> 1 right, 0 wrong, or what is between, in the test's order

LEVEL = 0.95
POWER = 0.8
UNLIKE = "a paired test needs the same seeds and the same items on both sides."


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
    means = [100 * _mean(run) for run in outcomes]
    value, seeds = float(np.mean(means)), len(means)
    if seeds > 1:
        return Mean(value, half_width(means), "seeds", seeds)
    error = 100 * math.sqrt(_item_variance(list(outcomes[0].values())))
    return Mean(value, error * float(norm.ppf((1 + LEVEL) / 2)), "items", 1)


def half_width(values: Sequence[float]) -> float:
    """Half the 95% interval of the mean of some runs' values, by Student's t; there must be two."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return error * float(student.ppf((1 + LEVEL) / 2, len(values) - 1))


@dataclass(frozen=True)
class Spread:
    """How a run's mean over tasks, as a share, varies with its seed; `freedom` is what the variance is known with."""

    variance: float
    freedom: int


def spread_over_seeds(methods: Iterable[Sequence[Outcomes]]) -> Spread | None:
    """Pooled over the methods with several seeds, as if all varied alike; None without one."""
    several = [[_mean(run) for run in runs] for runs in methods if len(runs) > 1]
    if not several:
        return None
    freedom = sum(len(means) - 1 for means in several)
    return Spread(float(sum(np.var(means) * len(means) for means in several)) / freedom, freedom)


@dataclass(frozen=True)
class Difference:
    """Of two methods' means over tasks, second less first, in points, with its 95% interval; p is two-sided.

    Attributes:
        items_only: whether nothing is known of how runs vary.
        error: standard error of the value, in points, and the degrees of freedom that it is known with.
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
        """The smallest difference, in points, that a test at 5%, two-sided, shows in 80% of such experiments.

        The minimum detectable effect (t(0.975, ν) + t(0.8, ν)) · standard error (Bloom 1995).
        """
        return self.error * float(student.ppf((1 + LEVEL) / 2, self.freedom) + student.ppf(POWER, self.freedom))

    def p_against(self, bound: float) -> float:
        """Two-sided p of the difference being `bound` points.

        "No worse than by m" is shown where the value is above -m and this is small for -m, and refuted where it is
        below: a test of non-inferiority, which a claim that something does not happen needs.
        """
        if not self.error:
            return float(self.value == bound)
        return 2 * float(student.sf(abs(self.value - bound) / self.error, self.freedom))


def compare(first: Sequence[Outcomes], second: Sequence[Outcomes]) -> Difference:
    """The paired difference of two methods, given the outcomes of each for the same seeds in the same order.

    Raises:
        ValueError: the two did not answer the same items for the same number of seeds.
    """
    if len(first) != len(second):
        raise ValueError(UNLIKE)
    by_seed = [_mean(b) - _mean(a) for a, b in zip(first, second, strict=True)]
    seeds = len(by_seed)
    of_seeds = float(np.var(by_seed, ddof=1)) / seeds if seeds > 1 else 0.0
    return _difference(first, second, of_seeds, max(1, seeds - 1), items_only=seeds == 1)


def compare_apart(first: Sequence[Outcomes], second: Sequence[Outcomes], spread: Spread) -> Difference:
    """The difference of two methods that have less than two seeds in common, whose runs vary by so much.

    Paired over the items; as for the runs, as if none had anything in common.

    Raises:
        ValueError: they did not answer the same items.
    """
    of_seeds = spread.variance * (1 / len(first) + 1 / len(second))
    return _difference(first, second, of_seeds, spread.freedom, items_only=False)


def _difference(
    first: Sequence[Outcomes], second: Sequence[Outcomes], of_seeds: float, seed_freedom: int, items_only: bool
) -> Difference:
    """`of_seeds` is the runs' share of the variance, of differences as shares; that of the items is added."""
    if any(_shape(run) != _shape(first[0]) for run in (*first, *second)):
        raise ValueError(UNLIKE)
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
    """Over tasks, each the mean of its items."""
    return float(np.mean([np.mean(rights) for rights in run.values()]))


def _item_variance(tasks: Sequence[Sequence[float]]) -> float:
    """Variance of the mean over tasks of the means of their items, the items being a sample."""
    variances = [np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.0 for values in tasks]
    return float(sum(variances)) / len(variances) ** 2


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
