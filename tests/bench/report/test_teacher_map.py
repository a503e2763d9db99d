"""The map of the teachers' grid: tests, crossovers and the regression of the protocol."""

import numpy as np
import pytest

from bench.records.provenance import provenance
from bench.records.teacher_cells import StudentResult, TeacherCell
from bench.report.teachers import Crossover, crossover, crossovers, judge_prediction, panel, report

RHOS = (0.0, 0.25, 0.5, 0.75, 1.0)
MADE_BY = provenance(__import__("torch").device("cpu"), jobs=1)


def cell(rho, difference, samples=256, tasks=2, predicted=0.6, noise=0.01, diverged=False, seeds=10):
    """Make a cell whose second method differs by `difference` on average, with noise that differs by seed."""
    noises = noise * np.linspace(-1, 1, seeds)
    first = [0.7 + 0.001 * seed for seed in range(seeds)]
    second = [a + difference + float(b) for a, b in zip(first, noises, strict=True)]
    if diverged:
        second[0] = None
    results = {
        name: StudentResult(learning_rate=1e-3, errors=errors, train_seconds=1.0)
        for name, errors in (("molora", first), ("malora-d32", second))
    }
    return TeacherCell(
        settings={}, tasks=tasks, samples=samples, rho_down=rho, rho_up=0.0, seeds=list(range(seeds)),
        predicted_crossover=predicted, checks={}, students=results, provenance=MADE_BY,
    )  # fmt: skip


def cells_of_line(zero, **options):
    """Make cells whose difference falls on a line that is 0 at ρ = `zero`."""
    return [cell(rho, 0.1 * (zero - rho), **options) for rho in RHOS]


def test_verdicts_of_a_panel_are_corrected_by_holm():
    found = panel([cell(0.0, 0.05), cell(0.5, 0.0), cell(1.0, -0.05), cell(1.0, -9.0, tasks=4)], 2, 0.0)
    assert [one.verdict for one in found] == ["first", "not distinguishable", "second"]
    # t = mean / (sd / √10) with 9 degrees of freedom; sd of 10 points from -0.01 to 0.01 is 0.00673.
    alone = panel([cell(0.0, 0.005)], 2, 0.0)[0]
    assert alone.p == pytest.approx(0.0435, abs=0.001) and alone.verdict == "first"
    of_three = panel([cell(rho, 0.005) for rho in RHOS[:3]], 2, 0.0)
    assert of_three[0].p == pytest.approx(3 * alone.p) and of_three[0].verdict == "not distinguishable"


def test_a_diverged_run_leaves_its_seed_out():
    (one,) = panel([cell(0.5, 0.05, diverged=True)], 2, 0.0)
    assert len(one.by_seed) == 9


def test_crossover_is_interpolated_with_an_interval_over_seeds():
    (found,) = crossovers(cells_of_line(0.6))
    assert found.observed == pytest.approx(0.6) and found.predicted == 0.6
    # A shift of all differences by e moves the crossover by 10 e, so the interval is ten times that of the mean.
    sd = 0.01 * np.std(np.linspace(-1, 1, 10), ddof=1)
    assert found.half_width == pytest.approx(10 * 2.262 * sd / np.sqrt(10), rel=0.01)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([cell(rho, 0.05) for rho in RHOS], "does not change"),
        ([*cells_of_line(0.6)[:-1], cell(1.0, 0.05)], "several times"),
        ([cell(rho, 0.1 * (rho - 0.6)) for rho in RHOS], "does not change as predicted"),
        ([*cells_of_line(0.6)[:-1], cell(1.0, -0.05, diverged=True)], "diverged"),
    ],
)
def test_no_crossover_has_a_reason(cells, reason):
    found = crossover(panel(cells, 2, 0.0))
    assert found.observed is None and reason in found.reason


def points(pairs):
    return [Crossover(2, 256, 0.0, predicted, observed, 0.01) for predicted, observed in pairs]


def test_prediction_is_judged_by_the_slope():
    predicted, wobble = np.linspace(0.2, 0.8, 7), 0.01 * np.array([1, -1, 0.5, -0.5, 1, -1, 0.2])
    assert judge_prediction(points(zip(predicted, predicted + wobble, strict=True))).verdict == "holds"
    flat = judge_prediction(points(zip(predicted, 0.4 + wobble, strict=True)))
    assert flat.verdict == "fails" and abs(flat.slope) < flat.half_width
    half = judge_prediction(points(zip(predicted, 0.5 * predicted + wobble, strict=True)))
    assert half.verdict == "fails" and half.slope == pytest.approx(0.5, abs=0.05)
    loose = judge_prediction(points(zip(predicted, 0.5 * predicted + 40 * wobble, strict=True)))
    assert loose.verdict == "undecided"


def test_predictions_near_the_ends_are_not_tested():
    # The protocol's grid with half of the variance explained: ρ* = 1 - 8 / N, at least 0.97.
    pairs = [(1 - 8 / N, 0.5) for N in (256, 512, 1024, 2048, 4096)]
    assert judge_prediction(points(pairs)).verdict == "not testable"
    assert judge_prediction(points([(0.5, 0.5)] * 5)).verdict == "not testable"  # one predicted value has no slope


def test_report_has_a_panel_for_each_number_of_tasks():
    text = report(cells_of_line(0.6) + cells_of_line(0.3, tasks=4))
    assert "## 2 tasks" in text and "## 4 tasks" in text and "**not testable**" in text
    row = next(line for line in text.splitlines() if line.startswith("| 256"))
    assert row.count("molora +") == 3 and row.count("malora-d32 -") == 2
