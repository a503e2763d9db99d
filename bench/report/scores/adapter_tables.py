"""Tables from the analysis of trained adapters.

They have Figures 2 and 3, and what the paper does not show.

Shapes: L decoder layers, N experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.experiments.methods import TITLES
from bench.experiments.registry import Experiment
from bench.records.schema import InsideSection, Record
from bench.report.markdown import number, table
from bench.report.paper import paper
from bench.report.scores.selection import TableRow
from bench.report.stats import half_width
from tasks import TASKS

START = "MT, at the start"
SETTINGS = ("ST(S)", "ST(D)", "MT", START)
# By method, setting and projection: the record, its mean correlation and the chance level.
Readings = dict[tuple[str, str, str], list[tuple[Record, float, float]]]


def section(experiment: Experiment, rows: Sequence[TableRow]) -> str:
    """Return the tables of a figure's page."""
    if not any(record.inside for row in rows for record in row.sources):
        return "No record here has an analysis of its adapter."
    return _similarity(rows) if experiment.figure == "similarity" else _analysis(rows)


def readings(rows: Sequence[TableRow], statistic: str) -> Readings:
    """Return each run's similarity of experts.

    ST(S) compares two runs on one task, ST(D) runs on two tasks, MT the experts of one multi-task run.

    Args:
        rows: Table rows.
        statistic: "mean" or "mean_square" of the canonical correlations.
    """
    found: Readings = defaultdict(list)
    for row in rows:
        names = {"ST(S)": "ST(S)", "ST(D)": "ST(D)"} if row.entry.single_task else {"within": "MT", "start": START}
        for record in row.sources:
            compared = record.inside.similarity if record.inside else {}
            for name in names.keys() & compared.keys():
                for projection, measured in compared[name][statistic].items():
                    if measured:
                        found[row.method, names[name], projection].append((record, *measured))
    return found


def _similarity(rows: Sequence[TableRow]) -> str:
    by_mean, by_square = readings(rows, "mean"), readings(rows, "mean_square")
    theirs, body = paper()["figure2"], []
    for method, setting, matrix in sorted(by_mean, key=lambda key: (key[0], SETTINGS.index(key[1]), key[2])):
        cells = []
        for found in (by_mean, by_square):
            _, values, chances = zip(*found[method, setting, matrix], strict=True)
            cells += [_with_interval(values), number(float(np.mean(chances)))]
        seen = theirs[matrix].get(setting) if method == "molora" else None
        cells += [str(len(by_mean[method, setting, matrix])), "" if seen is None else f"*{seen:g}*"]
        body.append([TITLES[method], setting, matrix, *cells])
    head = ["experts of", "setting", "matrix", "mean correlation", "chance", "mean square", "chance", "runs",
            "the paper's"]  # fmt: skip
    return (
        f"{table(body, head)}\n\nCanonical correlations of two experts' matrices, means over pairs and modules; ± is "
        "half a 95% interval over runs. A is the down projection, B the up projection. ST(S): one task, two seeds. "
        "ST(D): two tasks, two seeds. MT: the experts of one multi-task run, also at the start of training. Chance is "
        "the value for random matrices of these ranks. Experts over a shared S can differ within its d dimensions "
        "only. The paper does not say which statistic it shows; its values for B lie below the chance level of a mean "
        f"correlation. *Italics* are {paper()['figure2_source']} of the paper."
    )


def _analysis(rows: Sequence[TableRow]) -> str:
    seen = [
        (row, analyses)
        for row in rows
        if (analyses := [r.inside for r in row.sources if r.inside]) and not row.entry.single_task
    ]
    spectra = [line for row, analyses in seen for line in _spectrum_lines(row, analyses)]
    moved = [_movement_line(row, analyses) for row, analyses in seen]
    tasks = [line for row, analyses in seen for line in _task_lines(row, analyses)]
    layers = [line for row, analyses in seen for line in _layer_lines(row, analyses)]
    return "\n\n".join([
        "## Spectra",
        table(spectra, ["experts of", "matrix", "values", "largest", "upper quarter", "median", "lower quarter",
                        "smallest", "stable rank", "effective rank"]),
        "Singular values of a module's experts stacked, in descending order; means over modules and runs.",
        "## Movement of the down projection",
        table(moved, ["experts of", "factor", "moved", "least layer", "most", "angle, °", "runs"]),
        "Moved: ‖now − start‖ / ‖start‖. The angle is the mean principal angle between the row spaces.",
        "## Routing by task",
        table(tasks, ["experts of", "task", "entropy, nats", "largest share", "unused experts"]),
        "On validation prompts, means over routers. An expert without a token of the task is unused.",
        "## Load and routing by layer",
        table(layers, ["experts of", "layer", "most loaded", "least loaded", "task information, nats", "moved"]),
        "Shares of the assignments, with equal weight for each task. Task information is the mutual information of "
        "task and expert: 0 if routing does not depend on the task.",
    ])  # fmt: skip


def _spectrum_lines(row: TableRow, analyses: list[InsideSection]) -> list[list[Any]]:
    lines = []
    for matrix in ("A", "B"):
        values = _over(analyses, "spectra", matrix, "values")
        assert values is not None
        at = [values[round(share * (len(values) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
        ranks = [_over(analyses, "spectra", matrix, rank) for rank in ("stable_rank", "effective_rank")]
        lines.append([row.title, matrix, len(values), *map(number, [*at, *ranks])])
    return lines


def _movement_line(row: TableRow, analyses: list[InsideSection]) -> list[Any]:
    relative, angle = _over(analyses, "movement", "relative"), _over(analyses, "movement", "angle")
    factor = {"S": "S_A", "A": "A_t"}[analyses[0].movement.factor]
    return [row.title, factor, *map(number, [relative.mean(), relative.min(), relative.max(), angle]), len(analyses)]


def _task_lines(row: TableRow, analyses: list[InsideSection]) -> list[list[Any]]:
    kinds = ("entropy", "largest_share", "unused")
    return [
        [
            row.title,
            TASKS[task].title if task in TASKS else task,
            *(number(_over(analyses, "routing", kind, task).mean()) for kind in kinds),
        ]
        for task in analyses[0].routing.entropy
    ]


def _layer_lines(row: TableRow, analyses: list[InsideSection]) -> list[list[Any]]:
    load_LN, told_L = (_over(analyses, "routing", name) for name in ("load", "task_information"))
    moved_L = _over(analyses, "movement", "relative")
    return [
        [row.title, layer, *map(number, [load[0], load[-1], told_L[layer], moved_L[layer]])]
        for layer, load in enumerate(load_LN)
    ]


def reading(section: Any, *path: str) -> Any:
    """Return the value at a path of field names and keys."""
    for key in path:
        section = section[key] if isinstance(section, dict) else getattr(section, key)
    return section


def _over(analyses: Sequence[InsideSection], *path: str) -> Any:
    """Return the mean over runs of the value at a path.

    The value is an array or a number. Returns None if no run has it.
    """
    found = [value for analysis in analyses if (value := reading(analysis, *path)) is not None]
    return np.mean(found, axis=0) if found else None


def _with_interval(values: Sequence[float]) -> str:
    return number(float(np.mean(values))) + (f" ± {half_width(values):.2g}" if len(values) > 1 else "")
