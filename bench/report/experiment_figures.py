"""Choose the figures of an experiment and read their values from its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import malora
from bench.experiments.methods import BASE
from bench.experiments.registry import Experiment
from bench.records.schema import Record
from bench.records.speed_schema import SpeedRecord, SpeedRow
from bench.report import figures
from bench.report.figures import Line
from bench.report.scores.adapter_tables import reading, readings
from bench.report.scores.selection import TableRow
from bench.report.speed.summary import exact_rows, seconds
from tasks import TASKS

Figures = list[tuple[str, str]]  # titles and SVGs


def score_figures(experiment: Experiment, rows: list[TableRow], speeds: list[SpeedRecord]) -> Figures:
    """Draw mean scores by size and by step time, and the curves of training."""
    label, times, step = step_seconds(rows, speeds)
    if experiment.name == "table12":
        title = "Mean score against β, for each d (Figure 4b)"
        by_size = title, figures.means(title, "β", rows, _beta, None, _d)
    else:
        title = "Mean score against trainable parameters"
        by_size = title, figures.means(title, "trainable parameters", rows, _trainable)
    by_time = "Mean score against the time of a training step"
    loss, routers = "Training loss", "Routers in training: entropy, and the busiest expert's share"
    router_lines = {
        "entropy, nats": _router_lines(rows, "entropy"),
        "largest share": _router_lines(rows, "largest_share"),
    }
    return _drawn(
        by_size,
        (by_time, figures.means(by_time, label, times, step, "s")),
        (loss, figures.lines(loss, "step", {"loss": _loss_lines(rows)}, "log")),
        (routers, figures.lines(routers, "step", router_lines)),
    )


def adapter_figures(experiment: Experiment, rows: list[TableRow]) -> Figures:
    """Draw the analysis of trained adapters.

    It covers Figures 2 and 3, and routing, which the paper does not show.
    """
    if experiment.figure == "similarity":
        title = "How alike experts are (Figure 2)"
        return _drawn((title, figures.similarity(title, readings(rows, "mean"))))
    spectra = "Singular values of the stacked experts (Figure 3)"
    movement = "Movement of the down projection, and information of experts about the task, by layer"
    spectra_lines = {f"of {factor}": _adapter_lines(rows, "spectra", factor, "values") for factor in "AB"}
    movement_lines = {
        "relative movement": _adapter_lines(rows, "movement", "relative"),
        "information, nats": _adapter_lines(rows, "routing", "task_information"),
    }
    return _drawn(
        (spectra, figures.lines(spectra, "number", spectra_lines)),
        (movement, figures.lines(movement, "layer", movement_lines)),
        *(figure for row in rows for figure in _routing_figures(row)),
    )


def _drawn(*wanted: tuple[str, str | None]) -> Figures:
    """Leave out the figures that there are no records for."""
    return [(title, svg) for title, svg in wanted if svg]


def _trained(rows: list[TableRow]) -> list[Record]:
    return [record for row in rows for record in row.sources if record.train]


def _loss_lines(rows: list[TableRow]) -> list[Line]:
    lines = []
    for record in _trained(rows):
        points = [(p.step, p.loss) for p in record.train.curve if p.loss is not None] if record.train else []
        if points:
            lines.append(Line.through(points, record))
    return lines


def _router_lines(rows: list[TableRow], statistic: str) -> list[Line]:
    lines = []
    for record in _trained(rows):
        readings = [(p.step, getattr(p, statistic)) for p in record.train.router] if record.train else []
        points = [(step, value) for step, value in readings if value is not None]
        if points:
            lines.append(Line.through(points, record))
    return lines


def _analyzed(row: TableRow) -> list[Record]:
    return [] if row.entry.single_task else [record for record in row.sources if record.inside]


def _adapter_lines(rows: list[TableRow], *path: str) -> list[Line]:
    """Return a line per run from the values at a path of its analysis.

    The values are drawn by their place in the list.
    """
    return [
        Line.through(list(enumerate(reading(record.inside, *path))), record)
        for row in rows
        for record in _analyzed(row)
    ]


def _routing_figures(row: TableRow) -> Figures:
    """Draw the routing of a row's runs by layer.

    The figures are the busiest expert's share by task, and the load of the experts.
    """
    routing = [record.inside.routing for record in _analyzed(row) if record.inside]
    if not routing:
        return []
    shares = {TASKS[t].title: _mean([r.largest_share[t] for r in routing]) for t in routing[0].largest_share}
    load = _mean([r.load for r in routing]).T
    by_task = f"{row.title}: the busiest expert's share, by layer and task"
    by_expert = f"{row.title}: load of the experts, the busiest first, by layer"
    return [
        (by_task, figures.heat_map(by_task, "task", shares)),
        (by_expert, figures.heat_map(by_expert, "expert", dict(enumerate(load, 1)))),
    ]


def _mean(values: list[Any]) -> np.ndarray:
    """Return the mean over runs; an unknown value gives NaN."""
    mean: np.ndarray = np.array(values, dtype=float).mean(0)
    return mean


def _config(row: TableRow) -> Any:
    return malora.make_config(row.method, **row.entry.options)


def _beta(row: TableRow) -> float | None:
    return None if row.method == BASE else float(_config(row).beta)


def _d(row: TableRow) -> str:
    return f"d={_config(row).d}"


def _trainable(row: TableRow) -> int | None:
    parameters = row.records[0].parameters
    return None if parameters is None else parameters.trainable


def step_seconds(
    found: list[TableRow], speeds: list[SpeedRecord]
) -> tuple[str, list[TableRow], Callable[[TableRow], float | None]]:
    """Return the seconds per training step of each row's adapter.

    The adapter is computed in the fastest way. The seconds come from the one speed record that has most of the rows.
    The seconds of training runs are not comparable, because runs may share a machine.

    Returns:
        A label with the device, the rows, and a function from a row to its seconds; None if they are unknown.
    """

    def step(row: TableRow, record: SpeedRecord) -> float | None:
        same = [s for s in exact_rows(record) if (_method_of(s), s.trainable) == (row.method, _trainable(row))]
        return min(filter(None, map(seconds, same)), default=None)

    scored = [row for row in found if row.records]
    trained = [record for record in speeds if record.mode == "train"]
    if not trained:
        return "a step", [], lambda row: None
    best = max(trained, key=lambda record: sum(step(row, record) is not None for row in scored))
    return f"a step on {best.provenance.device}", scored, lambda row: step(row, best)


def _method_of(row: SpeedRow) -> str:
    return (row.method or BASE).removeprefix("peft-")
