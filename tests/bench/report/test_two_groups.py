"""Runs in two groups are found, and one normal sample is seldom called two."""

import numpy as np
import pytest
from scipy.stats import t as student

from bench.report import two_groups
from bench.report.two_groups import smaller_group


def test_one_run_apart_is_grubbs_outlier():
    """With a group of one the share between groups is G² n / (n - 1)², G by Grubbs (1950).

    The critical value of Grubbs's two-sided test for five values at 5% is 1.715.
    """
    quantile = student.ppf(1 - 0.05 / 10, 3)
    critical = 4 / 5**0.5 * (quantile**2 / (3 + quantile**2)) ** 0.5
    assert critical == pytest.approx(1.715, abs=1e-3)
    assert two_groups._limit(5) >= critical**2 * 5 / 16 - 0.005  # splits of two and three count as well
    assert smaller_group([58.3, 58.6, 57.5, 58.1, 50.0]) == [4]


def test_the_smaller_group_is_named_and_the_lower_of_equal_ones():
    low, high = [41.0, 41.2, 40.9], [55.0, 55.3, 55.1, 55.2]
    assert smaller_group([*high[:2], low[0], *high[2:], low[1]]) == [2, 5]
    assert smaller_group([*low, high[0], *low, high[1]]) == [3, 7]
    assert smaller_group([*high[:3], *low]) == [3, 4, 5]


def test_equal_and_few_runs_are_one_group():
    assert smaller_group([50.0] * 5) == [] == smaller_group([1.0, 1.0, 1.0, 9.0])
    assert smaller_group([]) == []


@pytest.mark.parametrize("runs", [5, 10])
def test_a_normal_sample_is_split_in_one_of_twenty_cases(runs):
    rng = np.random.default_rng(1)
    found = np.mean([bool(smaller_group(rng.standard_normal(runs))) for _ in range(2000)])
    assert found == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 2000) ** 0.5)
