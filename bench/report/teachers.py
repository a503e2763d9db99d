"""Map of the teachers' grid: which of two methods has the lower error, and where the sign changes.

The rules are those of docs/notes/protocol-2026-12-01.md, section 5:

- A cell's difference is paired by seed. Its test is Student's t at 5%, with Holm's correction over the panel.
- A panel is a number of tasks, at one value of the up projections' dial.
- The crossover of T and N is where the mean difference changes its sign, interpolated between two values of ρ. Its
  interval is over seeds, by the jackknife.
- Observed crossovers are regressed on predicted ones where the prediction is in (0.1, 0.9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress
from scipy.stats import t as student

from bench.records.teacher_cells import TeacherCell
from bench.report.markdown import number, table
from bench.report.stats import LEVEL, half_width, holm

TESTED = (0.1, 0.9)  # predicted crossovers outside of it are not tested
MIN_POINTS = 3  # of a regression; two give a slope without an interval


@dataclass(frozen=True)
class CellDifference:
    """Relative error of the second method less that of the first, in one cell.

    Attributes:
        by_seed: Differences, for the seeds where neither run diverged.
        p: Two-sided and corrected over the panel; 1 with fewer than two seeds.
        verdict: "first", "second" (has the lower error), or "not distinguishable".
    """

    cell: TeacherCell
    by_seed: tuple[float, ...]
    p: float
    verdict: str

    @property
    def mean(self) -> float:
        """Mean over seeds; not a number without any."""
        return float(np.mean(self.by_seed)) if self.by_seed else math.nan

    @property
    def half_width(self) -> float:
        """Half of the uncorrected 95% interval of the mean."""
        return half_width(self.by_seed) if len(self.by_seed) > 1 else math.nan


def panel(
    cells: Sequence[TeacherCell], tasks: int, rho_up: float, first: str = "molora", second: str = "malora-d32"
) -> list[CellDifference]:
    """Compare two methods in all cells of a panel.

    Args:
        cells: Cells of the grid.
        tasks: T of the panel.
        rho_up: The up projections' dial.
        first: Name of a student.
        second: Name of another one.
    """
    chosen = [cell for cell in cells if cell.tasks == tasks and cell.rho_up == rho_up]
    differences = [_by_seed(cell, first, second) for cell in chosen]
    adjusted = holm([_p_value(values) for values in differences])
    return [
        CellDifference(cell, tuple(values), p, _verdict(values, p))
        for cell, values, p in zip(chosen, differences, adjusted, strict=True)
    ]


def _by_seed(cell: TeacherCell, first: str, second: str) -> list[float]:
    pairs = zip(cell.students[first].errors, cell.students[second].errors, strict=True)
    return [float(b) - float(a) for a, b in pairs if a is not None and b is not None]


def _p_value(values: Sequence[float]) -> float:
    """Return the two-sided p of a mean of zero, by Student's t."""
    if len(values) < 2:
        return 1.0
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if not error:
        return float(np.mean(values) == 0)
    return 2 * float(student.sf(abs(float(np.mean(values))) / error, len(values) - 1))


def _verdict(values: Sequence[float], p: float) -> str:
    if p >= 1 - LEVEL:
        return "not distinguishable"
    return "second" if np.mean(values) < 0 else "first"


@dataclass(frozen=True)
class Crossover:
    """Where one method overtakes the other, for one T, N and dial of the up projections.

    Attributes:
        predicted: ρ* of the prediction.
        observed: ρ above which the second method has the lower error; None unless there is exactly one change of the
            sign, from the first method to the second.
        half_width: Half of the 95% interval over seeds.
        reason: Why there is no observed value.
    """

    tasks: int
    samples: int
    rho_up: float
    predicted: float
    observed: float | None
    half_width: float | None
    reason: str = ""

    @property
    def is_tested(self) -> bool:
        """Whether the protocol tests the prediction here, and there is an observed value."""
        return TESTED[0] < self.predicted < TESTED[1] and self.observed is not None


def crossover(differences: Sequence[CellDifference]) -> Crossover:
    """Find the crossover over the cells of one T, N and dial of the up projections."""
    ordered = sorted(differences, key=lambda one: float(one.cell.rho_down))
    cell = ordered[0].cell
    seeds = {len(one.by_seed) for one in ordered}
    known = cell.tasks, cell.samples, float(cell.rho_up), float(cell.predicted_crossover)
    if seeds != {len(cell.seeds)}:
        return Crossover(*known, None, None, "a run diverged")
    rhos = [float(one.cell.rho_down) for one in ordered]
    values_RS = np.array([one.by_seed for one in ordered])
    signs = np.sign(values_RS.mean(1))
    changes = [i for i in range(len(rhos) - 1) if signs[i] != signs[i + 1]]
    if len(changes) != 1 or signs[0] <= 0:
        reason = "the sign changes several times" if len(changes) > 1 else "the sign does not change as predicted"
        return Crossover(*known, None, None, reason)
    (i,) = changes
    find = _interpolation(rhos[i], rhos[i + 1])
    observed = find(values_RS[i].mean(), values_RS[i + 1].mean())
    return Crossover(*known, observed, _jackknife(find, values_RS[i], values_RS[i + 1]))


def _interpolation(low: float, high: float) -> Callable[[float, float], float]:
    """Return the function from the differences at two values of ρ to the ρ where a line through them is 0."""
    return lambda at_low, at_high: float(low + (high - low) * at_low / (at_low - at_high))


def _jackknife(find: Callable[[float, float], float], low_S: np.ndarray, high_S: np.ndarray) -> float | None:
    """Return half of the 95% interval over seeds, from estimates that leave out one seed each (Tukey 1958)."""
    S = len(low_S)
    if S < 2:
        return None
    left_out = [find(np.delete(low_S, s).mean(), np.delete(high_S, s).mean()) for s in range(S)]
    error = math.sqrt((S - 1) / S * float(np.square(np.array(left_out) - np.mean(left_out)).sum()))
    return error * float(student.ppf((1 + LEVEL) / 2, S - 1))


def crossovers(cells: Sequence[TeacherCell], first: str = "molora", second: str = "malora-d32") -> list[Crossover]:
    """Find the crossovers of every T, N and dial of the up projections."""
    found = []
    for tasks, rho_up in sorted({(cell.tasks, float(cell.rho_up)) for cell in cells}):
        compared = panel(cells, tasks, rho_up, first, second)
        for samples in sorted({one.cell.samples for one in compared}):
            found.append(crossover([one for one in compared if one.cell.samples == samples]))
    return found


@dataclass(frozen=True)
class Prediction:
    """Regression of observed crossovers on predicted ones.

    Attributes:
        points: Crossovers that count.
        slope: Slope; None if there are too few points or predictions.
        half_width: Half of its 95% interval.
        verdict: "holds", "fails", "undecided" or "not testable".
    """

    points: int
    slope: float | None
    half_width: float | None
    verdict: str


def judge_prediction(found: Sequence[Crossover]) -> Prediction:
    """Test the predicted crossovers as the protocol does.

    It holds if the slope's 95% interval has 1 and not 0, and fails if it has 0 and not 1 or neither.
    """
    points = [(one.predicted, one.observed) for one in found if one.is_tested and one.observed is not None]
    if len(points) < MIN_POINTS or len({predicted for predicted, _ in points}) < 2:
        return Prediction(len(points), None, None, "not testable")
    fit = linregress([predicted for predicted, _ in points], [observed for _, observed in points])
    half = float(fit.stderr) * float(student.ppf((1 + LEVEL) / 2, len(points) - 2))
    slope = float(fit.slope)
    has_one, has_zero = abs(slope - 1) <= half, abs(slope) <= half
    verdict = "undecided" if has_one and has_zero else "holds" if has_one else "fails"
    return Prediction(len(points), slope, half, verdict)


def report(cells: Sequence[TeacherCell], first: str = "molora", second: str = "malora-d32") -> str:
    """Return the map as Markdown: a table per panel, the crossovers, and the test of the prediction."""
    signs = {"first": first, "second": second, "not distinguishable": "·"}
    lines = [
        f"# {second} against {first}: relative error on fresh inputs\n",
        f"A cell names the method with the lower error (p < 0.05 with Holm over the panel), or a dot. Next to it is "
        f"the error of {second} less that of {first}, in percent of the frozen layer's, with its 95% interval.\n",
    ]
    for tasks, rho_up in sorted({(cell.tasks, float(cell.rho_up)) for cell in cells}):
        compared = panel(cells, tasks, rho_up, first, second)
        rhos = sorted({float(one.cell.rho_down) for one in compared})
        body = []
        for samples in sorted({one.cell.samples for one in compared}):
            of_row = {float(one.cell.rho_down): one for one in compared if one.cell.samples == samples}
            body.append([str(samples), *(_text(of_row.get(rho), signs) for rho in rhos)])
        lines.append(f"## {tasks} tasks, ρ of the up projections {rho_up:g}\n")
        lines.append(table(body, ["samples", *(f"ρ = {rho:g}" for rho in rhos)]) + "\n")
    found = crossovers(cells, first, second)
    lines.append("## Crossovers\n")
    body = [
        [
            str(c.tasks),
            str(c.samples),
            f"{c.rho_up:g}",
            number(c.predicted),
            number(c.observed),
            number(c.half_width),
            c.reason,
        ]
        for c in found
    ]
    lines.append(table(body, ["tasks", "samples", "ρ up", "predicted", "observed", "±", "why not"]) + "\n")
    prediction = judge_prediction(found)
    lines.append(
        f"Prediction: **{prediction.verdict}**, {prediction.points} crossovers with a predicted value in {TESTED}, "
        f"slope {number(prediction.slope) or '–'} ± {number(prediction.half_width) or '–'}."
    )
    return "\n".join(lines)


def _text(one: CellDifference | None, signs: dict[str, str]) -> str:
    if one is None:
        return ""
    return f"{signs[one.verdict]} {100 * one.mean:+.2f} ± {100 * one.half_width:.2f}"
