"""Statistics against textbook cases and simulation."""

import numpy as np
import pytest

from bench.report.stats import Spread, compare, compare_apart, holm, mean_over_seeds, spread_over_seeds


def outcomes(rng, p, n=400, tasks=2):
    return {f"task{i}": list((rng.random(n) < p).astype(int)) for i in range(tasks)}


def test_the_interval_over_seeds_is_students():
    """50, 52, 54: mean 52, standard error 2/√3, t(0.975, 2) = 4.3027."""
    runs = [{"t": [1] * (k * 10) + [0] * (1000 - k * 10)} for k in (50, 52, 54)]
    mean = mean_over_seeds(runs)
    assert mean.value == pytest.approx(52) and mean.over == "seeds" and mean.seeds == 3
    assert mean.half_width == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)
    assert mean.interval_of_another(3) == pytest.approx(mean.half_width * 2**0.5)


def test_with_one_seed_it_is_the_items():
    """Compute the error of two tasks of 100 items at one half.

    The standard error of their mean is √(2 · 0.25/99) / 2.
    """
    mean = mean_over_seeds([{t: [0, 1] * 50 for t in "ab"}])
    assert mean.over == "items" and mean.half_width == pytest.approx(1.96 * 100 * (2 * 0.25 / 99) ** 0.5 / 2, rel=1e-4)


def test_the_same_answers_do_not_differ():
    same = [outcomes(np.random.default_rng(0), 0.6)] * 3
    difference = compare(same, same)
    assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1.0)


def test_a_large_difference_is_found_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    difference = compare([outcomes(rng, 0.5) for _ in range(5)], [outcomes(rng, 0.65) for _ in range(5)])
    assert difference.p < 0.05 and 0 < difference.low < 15 < difference.high


def false_alarms(seeds, between_seeds, draws=300):
    """Return how often two equal methods are called different.

    `between_seeds` is the standard deviation between seeds.
    """
    rng = np.random.default_rng(1)

    def method():
        return [outcomes(rng, np.clip(0.5 + between_seeds * rng.standard_normal(), 0, 1), n=100) for _ in range(seeds)]

    return sum(compare(method(), method()).p < 0.05 for _ in range(draws)) / draws


@pytest.mark.parametrize("seeds, between_seeds", [(1, 0.0), (3, 0.0), (3, 0.06), (5, 0.06)])
def test_no_difference_is_called_one_in_at_most_one_of_twenty_cases(seeds, between_seeds):
    """Allow up to 5% and 3 standard errors of 300 draws.

    With one seed, this holds only where runs do not vary.
    """
    assert false_alarms(seeds, between_seeds) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_one_seed_does_not_know_how_runs_vary():
    """Why a table says "on these items" there."""
    assert false_alarms(1, 0.06) > 0.15


def test_the_spread_is_pooled_over_methods_with_several_seeds():
    """Pool the means 50, 54 and 40, 44, 48.

    The sums of squares are 8 and 32, on 1 + 2 degrees of freedom.
    """
    methods = [[{"t": [1] * k + [0] * (100 - k)} for k in means] for means in ((50, 54), (40, 44, 48), (10,))]
    assert spread_over_seeds(methods) == Spread(pytest.approx(40 / 3 / 100**2), 3)
    assert spread_over_seeds(methods[2:]) is None


def test_one_seed_with_the_spread_of_others_is_seldom_wrong():
    """Compare two equal methods of one and two seeds, with two others of three.

    See `false_alarms`.
    """
    rng = np.random.default_rng(4)

    def method(seeds):
        return [outcomes(rng, np.clip(0.5 + 0.06 * rng.standard_normal(), 0, 1), n=100) for _ in range(seeds)]

    found = [compare_apart(method(1), method(2), spread_over_seeds([method(3), method(3)])) for _ in range(300)]
    assert np.mean([d.p < 0.05 for d in found]) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5
    assert not any(d.items_only for d in found) and compare(method(1), method(1)).items_only


def shown(seeds, between_seeds, gain, draws=300):
    """Return how often a true gain is shown, and the mean smallest difference.

    The gain is in points. The mean is that of the smallest detectable difference.
    """
    rng = np.random.default_rng(2)

    def method(mean):
        return [outcomes(rng, np.clip(mean + between_seeds * rng.standard_normal(), 0, 1), n=200) for _ in range(seeds)]

    found = [compare(method(0.5), method(0.5 + gain / 100)) for _ in range(draws)]
    return np.mean([d.p < 0.05 and d.value > 0 for d in found]), np.mean([d.smallest for d in found])


@pytest.mark.parametrize("seeds, between_seeds", [(1, 0.0), (5, 0.04)])
def test_the_smallest_difference_is_shown_in_four_of_five_experiments(seeds, between_seeds):
    _, smallest = shown(seeds, between_seeds, gain=5.0, draws=100)
    power, _ = shown(seeds, between_seeds, gain=smallest)
    assert power == pytest.approx(0.8, abs=0.08)  # three standard errors of 300 draws are 0.07


def test_no_worse_than_a_margin_is_wrongly_shown_in_at_most_one_of_forty_cases():
    """At the margin itself, where half of the two-sided 5% would say "no worse"."""
    rng = np.random.default_rng(3)

    def method(mean):
        return [outcomes(rng, np.clip(mean + 0.03 * rng.standard_normal(), 0, 1), n=200) for _ in range(5)]

    found = [compare(method(0.5), method(0.49)) for _ in range(300)]
    wrong = np.mean([d.value > -1 and d.p_against(-1.0) < 0.05 for d in found])
    assert wrong <= 0.025 + 3 * (0.025 * 0.975 / 300) ** 0.5
    assert all(d.p_against(0.0) == pytest.approx(d.p) for d in found)


def test_the_power_is_that_of_a_noncentral_t():
    """At the smallest difference the power is close to 80%, and at the bound it is the level."""
    rng = np.random.default_rng(5)
    d = compare(*([outcomes(rng, 0.5 + gain + 0.03 * rng.standard_normal()) for _ in range(4)] for gain in (0, 0.05)))
    assert d.power_at(d.smallest) == pytest.approx(0.8, abs=0.02)
    assert d.power_at(0) == pytest.approx(0.05) == pytest.approx(d.power_at(-1, bound=-1))
    assert d.power_at(d.smallest - 1, bound=-1) == pytest.approx(d.power_at(d.smallest))


def test_the_effect_size_is_cohens():
    """Cohen (1988), table 6.2.1: h of 0.50 and 0.60 is 0.20."""
    d = compare([{"t": [1] * 50 + [0] * 50}], [{"t": [1] * 60 + [0] * 40}])
    assert d.effect == pytest.approx(0.20, abs=0.005)


def test_pairing_counts():
    """Check that the same 10 of 400 items turned right is surer than two samples.

    The two samples are independent and have the same means.
    """
    base = [0, 1] * 200
    better = [1] * 20 + base[20:]
    assert compare([{"t": base}], [{"t": better}]).p < 0.01
    rng = np.random.default_rng(0)
    assert compare([{"t": base}], [{"t": list(rng.permutation(better))}]).p > 0.1


def test_unlike_items_are_refused():
    with pytest.raises(ValueError, match="same seeds and the same items"):
        compare([{"t": [1, 0]}], [{"t": [1]}])
    with pytest.raises(ValueError, match="the same items"):
        compare_apart([{"t": [1, 0]}], [{"t": [1]}], Spread(0.1, 2))


def test_holm():
    """Holm (1979): 0.01, 0.02, 0.04 of three tests become 0.03, 0.04, 0.04."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
