"""Against textbook cases and simulation."""

import numpy as np
import pytest

from bench.stats import compare, holm, mean_over_seeds


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
    """Two tasks of 100 items at one half: standard error of their mean √(2 · 0.25/99) / 2."""
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
    """How often two methods that do not differ are called different, when runs vary by so much."""
    rng = np.random.default_rng(1)

    def method():
        return [outcomes(rng, np.clip(0.5 + between_seeds * rng.standard_normal(), 0, 1), n=100) for _ in range(seeds)]

    return sum(compare(method(), method()).p < 0.05 for _ in range(draws)) / draws


@pytest.mark.parametrize("seeds, between_seeds", [(1, 0.0), (3, 0.0), (3, 0.06), (5, 0.06)])
def test_no_difference_is_called_one_in_at_most_one_of_twenty_cases(seeds, between_seeds):
    """Up to 5% and 3 standard errors of 300 draws; with one seed only where runs do not vary."""
    assert false_alarms(seeds, between_seeds) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_one_seed_does_not_know_how_runs_vary():
    """Why a table says "on these items" there."""
    assert false_alarms(1, 0.06) > 0.15


def test_pairing_counts():
    """The same 10 of 400 items turned right is surer than two independent samples of the same means."""
    base = [0, 1] * 200
    better = [1] * 20 + base[20:]
    assert compare([{"t": base}], [{"t": better}]).p < 0.01
    rng = np.random.default_rng(0)
    assert compare([{"t": base}], [{"t": list(rng.permutation(better))}]).p > 0.1


def test_unlike_items_are_refused():
    with pytest.raises(ValueError, match="same seeds and the same items"):
        compare([{"t": [1, 0]}], [{"t": [1]}])


def test_holm():
    """Holm (1979): 0.01, 0.02, 0.04 of three tests become 0.03, 0.04, 0.04."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
