import pytest

from bench.regress import bounds
from bench.regress.figures import Measured


@pytest.fixture
def measured(monkeypatch):
    """Bounds of figures whose other measurements are given: another arithmetic, and a base of its own."""

    def measure(figure, elsewhere, other_base, repeated=None):
        def in_process(parts, variables):
            found = other_base if "MALORA_CACHE" in variables else elsewhere if variables else repeated
            return {"x": found}

        monkeypatch.setattr(bounds, "measure_in_process", in_process)
        return bounds.measure_bounds({"x": figure})["x"]

    return measure


def test_bounds_of_a_number_are_multiples_of_its_spread(measured):
    figure = measured(Measured(2.0, "number", least=0.002), 2.001, 2.1)
    assert (figure.value, figure.same, figure.elsewhere, figure.other_base) == (2.0, 0, 0.01, 0.3)
    assert measured(Measured(2.0, "number", least=0.002), 2.0, 2.0).elsewhere == 0.002


def test_what_differs_with_the_arithmetic_is_not_compared_elsewhere(measured):
    independent, dependent = measured(Measured("h", "exact"), "h", "h"), measured(Measured("h", "exact"), "h", "other")
    assert (independent.elsewhere, independent.other_base) == (0, 0)
    assert (dependent.same, dependent.elsewhere, dependent.other_base) == (0, None, None)


def test_a_cost_is_the_median_with_a_bound_from_repetitions(measured):
    figure = measured(Measured(1.0, "cost"), 1.0, 1.0, repeated=1.2)
    assert (figure.value, figure.same, figure.only_above) == (1.2, 0.6, True)
    assert measured(Measured(1.0, "cost"), 1.0, 1.0, repeated=1.0).same == bounds.COST_SAME
