"""What records say of their adapters' insides, as tables: Figures 2 and 3, and what the paper does not show."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from tabulate import tabulate

from bench.experiments.methods import TITLES
from bench.experiments.registry import Experiment
from bench.records.schema import InsideSection, Record
from bench.report.paper import paper
from bench.report.scores.selection import TableRow
from bench.report.stats import half_width
from tasks import TASKS

START = "MT, at the start"
SETTINGS = ("ST(S)", "ST(D)", "MT", START)


def section(experiment: Experiment, rows: list[TableRow]) -> str:
    """The tables of a figure's page."""
    if not any(record.inside for row in rows for record in row.sources):
        return "No record here says what is inside."
    return _similarity(rows) if experiment.figure == "similarity" else _inside(rows)


def readings(rows: list[TableRow], statistic: str) -> dict[tuple[str, str, str], list[tuple[Record, float, float]]]:
    """By method, setting and side, each run's mean correlation and its chance level.

    ST(S) compares two runs of one task, ST(D) of two tasks, MT the experts of one multi-task run.
    """
    found = defaultdict(list)
    for row in rows:
        names = {"ST(S)": "ST(S)", "ST(D)": "ST(D)"} if row.entry.single_task else {"within": "MT", "start": START}
        for record in row.sources:
            for name in names.keys() & (record.inside.similarity.keys() if record.inside else set()):
                for side, measured in record.inside.similarity[name][statistic].items():
                    if measured:
                        found[row.method, names[name], side].append((record, *measured))
    return found


def _similarity(rows: list[TableRow]) -> str:
    by_mean, by_square = readings(rows, "mean"), readings(rows, "mean_square")
    theirs, body = paper()["figure2"], []
    for method, setting, side in sorted(by_mean, key=lambda key: (key[0], SETTINGS.index(key[1]), key[2])):
        cells = []
        for found in (by_mean, by_square):
            _, values, chances = zip(*found[method, setting, side], strict=True)
            cells += [_with_interval(values), show(np.mean(chances))]
        seen = theirs[side].get(setting) if method == "molora" else None
        cells += [len(values), "" if seen is None else f"*{seen:g}*"]
        body.append([TITLES[method], setting, side, *cells])
    head = [
        "experts of",
        "setting",
        "side",
        "mean correlation",
        "chance",
        "mean square",
        "chance",
        "runs",
        "the paper's",
    ]
    return (
        f"{_table(body, head)}\n\nCanonical correlations of two experts' matrices, means over pairs and modules; ± is "
        "half a 95% interval over runs. A is the down side, B the up side. ST(S): one task, two seeds; ST(D): two "
        "tasks, two seeds; MT: the experts of one multi-task run, whose A at the start is the row below it. Chance is "
        "what random matrices of these ranks have; experts over a shared S can differ within its d dimensions only. "
        "The paper does not say which statistic it shows; its B lie below the chance level of a mean correlation. "
        f"*Italics* are {paper()['figure2_source']} of the paper."
    )


def _inside(rows: list[TableRow]) -> str:
    seen = [
        (row, insides)
        for row in rows
        if (insides := [r.inside for r in row.sources if r.inside]) and not row.entry.single_task
    ]
    spectra, moved, tasks, layers = [], [], [], []
    for row, insides in seen:
        for side in ("A", "B"):
            values = _over(insides, "spectra", side, "values")
            at = [values[round(share * (len(values) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
            ranks = [_over(insides, "spectra", side, rank) for rank in ("stable_rank", "effective_rank")]
            spectra.append([row.title, side, len(values), *map(show, at), *map(show, ranks)])
        relative, angles = _over(insides, "movement", "relative"), [one.movement.angle for one in insides]
        factor = {"S": "S_A", "A": "A_t"}[insides[0].movement.factor]
        moved.append([row.title, factor, show(relative.mean()), show(relative.min()), show(relative.max()),
                      show(np.mean(angles)), len(insides)])  # fmt: skip
        for task in insides[0].routing.entropy:
            kinds = ("entropy", "largest_share", "unused")
            tasks.append([row.title, TASKS[task].title if task in TASKS else task,
                          *(show(_over(insides, "routing", kind, task).mean()) for kind in kinds)])  # fmt: skip
        load, told = (_over(insides, "routing", what) for what in ("load", "task_information"))
        layers += [
            [
                row.title,
                i,
                show(load[i][0]),
                show(load[i][-1]),
                show(told[i]),
                show(relative[i]),
            ]
            for i in range(len(load))
        ]
    return "\n\n".join([
        "## Spectra",
        _table(spectra, ["experts of", "side", "values", "largest", "upper quarter", "median", "lower quarter", "least",
                         "stable rank", "effective rank"]),
        "Singular values of a module's experts stacked, in descending order; means over modules and runs.",
        "## How far the down side moved",
        _table(moved, ["experts of", "factor", "moved", "least layer", "most", "angle, °", "runs"]),
        "Moved: ‖now − start‖ / ‖start‖; the angle is the mean principal angle between the row spaces.",
        "## Routing by task",
        _table(tasks, ["experts of", "task", "entropy, nats", "largest share", "unused experts"]),
        "On validation prompts, means over routers; experts that got no token of a task are unused.",
        "## Load and routing by layer",
        _table(layers, ["experts of", "layer", "most loaded", "least loaded", "task information, nats", "moved"]),
        "Shares of the assignments, tasks weighted alike. Task information is the mutual information of task and "
        "expert: 0 where routing does not depend on the task.",
    ])  # fmt: skip


def reading(section: Any, *path: str) -> Any:
    """Return the value at a path of field names and keys."""
    for key in path:
        section = section[key] if isinstance(section, dict) else getattr(section, key)
    return section


def _over(insides: list[InsideSection], *path: str) -> np.ndarray | None:
    """Return the mean over runs of the value at a path, or None where no run has it."""
    found = [value for inside in insides if (value := reading(inside, *path)) is not None]
    return np.mean(found, axis=0) if found else None


def _with_interval(values: tuple[float, ...]) -> str:
    return show(np.mean(values)) + (f" ± {half_width(values):.2g}" if len(values) > 1 else "")


def _table(body: list[list[Any]], head: list[str]) -> str:
    return tabulate(body, head, tablefmt="pipe", disable_numparse=True)


def show(value: float | None) -> str:
    return "" if value is None else f"{value if abs(value) > 1e-9 else 0:.3g}"  # float64's rounding is no value
