"""Find runs that fall into two groups, for example those that learned a task and those that did not.

Student's t assumes normal runs. If one run in five is 2.5 standard deviations low, a 95% interval of five runs covers
the mean in 77% of cases. Such runs are therefore named.

The statistic is the largest share of the sum of squares that lies between two groups, over all splits of the sorted
values (Engelman and Hartigan 1969). With a group of one it is Grubbs's test for an outlier. Its 5% limit comes from
simulated normal samples of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from bench.report.stats import LEVEL

MIN_RUNS = 5  # fewer runs are in two groups by chance too often for a split to stand out
_DRAWS = 20_000


def smaller_group(values: Sequence[float]) -> list[int]:
    """Return the indices of the smaller of two groups of runs, in ascending order.

    Returns an empty list if the values look like one normal sample at 5%, or if they are fewer than MIN_RUNS. Of equal
    groups, the lower one is returned.

    Args:
        values: A value for each run.
    """
    if len(values) < MIN_RUNS or min(values) == max(values):
        return []
    order = np.argsort(values, kind="stable")
    shares = _shares_between(np.array(values, dtype=float)[order][None])[0]
    split = int(shares.argmax()) + 1
    if shares[split - 1] <= _limit(len(values)):
        return []
    return sorted((order[:split] if 2 * split <= len(values) else order[split:]).tolist())


@cache
def _limit(runs: int) -> float:
    """Return the 95% quantile of the statistic for one normal sample of this size."""
    samples = np.sort(np.random.default_rng(0).standard_normal((_DRAWS, runs)), axis=1)
    return float(np.quantile(_shares_between(samples).max(axis=1), LEVEL))


def _shares_between(sorted_values: np.ndarray) -> np.ndarray:
    """Return the share of the sum of squares between two groups, [samples, runs - 1], by the size of the lower group.

    Args:
        sorted_values: [samples, runs], ascending in each row.
    """
    runs = sorted_values.shape[1]
    centred = sorted_values - sorted_values.mean(axis=1, keepdims=True)
    sizes = np.arange(1, runs)
    lower = centred.cumsum(axis=1)[:, :-1]  # the sum of the lower group; that of the upper one is its negative
    between = lower**2 * (1 / sizes + 1 / (runs - sizes))
    return np.asarray(between / (centred**2).sum(axis=1, keepdims=True))
