"""Leaderboards, runs and scores as tidy pandas frames, for CSV and JSON files.

The figures are those of the pages. They are computed by the same functions, and not rounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from bench.records.schema import Record
from bench.report.paper import paper
from bench.report.readme import published_selections
from bench.report.scores.leaderboard import Standings, standings
from bench.report.scores.selection import Rates, Selection, TableRow
from bench.report.stats import Mean, mean_over_seeds
from tasks import TASKS

MEAN = "mean"  # stands in the column `task` for the mean over tasks

# Columns by file, with their meanings. The guide on leaderboards lists them.
COLUMNS: dict[str, dict[str, str]] = {
    "leaderboards": {
        "profile": "size of the experiment",
        "experiment": "name of the table or figure, as in `python -m bench list experiments`",
        "rates": "`own`: each method at its own learning rate; `paper`: all at the paper's",
        "model": "base model",
        "mixture": "tasks that were trained on",
        "method": "name of the method; `base` is the base model without an adapter",
        "row": "title of the row, which differs from the method's where options do",
        "learning_rate": "learning rate of the runs; empty for the base",
        "trainable": "number of trainable parameters; empty for the base",
        "task": f"name of the task, or `{MEAN}` for the mean over tasks",
        "metric": f"metric of the task; in `{MEAN}` rows, all metrics that were averaged",
        "mean": "mean over seeds in percent; empty if no run ended well",
        "low": "lower end of the 95% interval of the mean",
        "high": "upper end of the 95% interval of the mean",
        "interval_over": "what the interval covers: `seeds`, or `items` with a single seed",
        "seeds": "number of runs that ended well",
        "broken": "number of runs that diverged or ran out of memory",
        "paper": "the paper's own figure in percent, from a larger model",
        "reference": f"title of the row that this one is tested against; `{MEAN}` rows only, like all that follow",
        "difference": "difference from the reference in points",
        "difference_low": "lower end of its 95% interval",
        "difference_high": "upper end of its 95% interval",
        "p": "p of the paired test, with Holm's correction over all pairs of rows, or over the comparisons with a "
        "reference fixed beforehand",
        "verdict": "`better`, `worse`, `not distinguishable`, and their limits",
    },
    "runs": {
        "id": "name of the run and of its record",
        "profile": "size of the experiment",
        "model": "base model",
        "model_hash": "hash of the base model",
        "mixture": "tasks that were trained on",
        "format": "prompt format",
        "method": "name of the method",
        "method_options": "options that differ from the method's defaults, as JSON",
        "seed": "seed of initialisation, order and dropout",
        "learning_rate": "maximum learning rate; empty for the base",
        "epochs": "passes over the training examples",
        "batch_size": "examples per batch",
        "max_steps": "limit of a run that was cut short",
        "max_items": "limit of a scoring that was cut short",
        "status": "`ok`, `diverged` or `oom` (out of memory)",
        "validation": "mean over tasks on the validation sets, in percent",
        "test": "mean over tasks on the test sets, in percent",
        "trainable": "number of trainable parameters",
        "adapter_bytes": "size of the saved adapter",
        "steps": "optimizer steps",
        "tokens": "tokens trained on",
        "training_seconds": "time of all training steps",
        "evaluation_seconds": "time of scoring",
        "peak_bytes": "peak GPU memory; empty on a CPU",
        "device": "name of the GPU or CPU",
        "concurrent_runs": "runs that shared the machine; with more than one, do not compare seconds",
        "time": "when the run was made, in UTC",
        "commit": "commit of the code",
    },
    "scores": {
        "id": "name of the run",
        "split": "`validation` or `test`",
        "task": "name of the task",
        "metric": "metric of the task",
        "score": "mean over items in percent",
        "stderr": "standard error of the score, in points",
        "items": "number of items",
    },
}


def export_frames(records: Mapping[str, Sequence[Record]]) -> dict[str, pd.DataFrame]:
    """Return a frame for each file of `COLUMNS`.

    Args:
        records: Records by profile.
    """
    runs = [record for mine in records.values() for record in mine]
    rows = {"leaderboards": _leaderboard_rows(records), "runs": map(_run_row, runs), "scores": _score_rows(runs)}
    return {name: pd.DataFrame(list(rows[name]), columns=list(columns)) for name, columns in COLUMNS.items()}


def _leaderboard_rows(records: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, Any]]:
    for selection in published_selections(records):
        if selection.experiment.figure or selection.frame.empty:
            continue
        for name, rates in _rates_of(selection).items():
            found = standings(selection, rates)
            for row in [*found.base, *found.rows]:
                shared = {
                    "profile": selection.profile,
                    "experiment": selection.experiment.name,
                    "rates": name,
                    "model": row.sources[0].config.model,
                    "mixture": row.sources[0].config.mixture,
                    "method": row.method,
                    "row": row.title,
                    "learning_rate": row.rate,
                    "seeds": len(row.records),
                    "broken": len(row.broken),
                }
                for cells in _cells(selection, found, row):
                    yield shared | cells


def _rates_of(selection: Selection) -> dict[str, Rates]:
    """Return the learning rates of each leaderboard on the experiment's page, by name."""
    if not selection.experiment.both_rates:
        return {"own": selection.at_own_rate}
    tuned = {"own": selection.rates.tuned} if selection.rates.tuned else {}
    return {**tuned, "paper": selection.at_paper_rate}


def _cells(selection: Selection, found: Standings, row: TableRow) -> Iterator[dict[str, Any]]:
    """Yield what differs between the tasks of a row; the mean over tasks is the last."""
    if not row.records:
        yield {"task": MEAN}
        return
    theirs = paper().get(selection.experiment.name, {}).get(row.title, {})
    tests = row.records[0].test or {}
    shared = {"trainable": row.trainable}
    for task in found.tasks:
        over_seeds = mean_over_seeds([{task: (record.items or {})[task]} for record in row.records])
        yield shared | {
            "task": task,
            "metric": tests[task].metric,
            "paper": theirs.get(TASKS[task].title),
            **_interval(row.task_mean(task), over_seeds),
        }
    metrics = " ".join(sorted({score.metric for score in tests.values()}))
    cells = {"task": MEAN, "metric": metrics, "paper": theirs.get("AVG"), **_interval(row.mean.value, row.mean)}
    yield shared | cells | _verdict(found, row)


def _interval(value: float, over_seeds: Mean) -> dict[str, Any]:
    half = over_seeds.half_width
    return {"mean": value, "low": value - half, "high": value + half, "interval_over": over_seeds.over}


def _verdict(found: Standings, row: TableRow) -> dict[str, Any]:
    verdict = found.verdicts.get(row.title)
    if verdict is None or found.reference is None or row in found.base:
        return {}
    cells: dict[str, Any] = {"reference": found.reference.title, "verdict": verdict.word}
    if (d := verdict.difference) is not None:
        cells |= {"difference": d.value, "difference_low": d.low, "difference_high": d.high, "p": verdict.p}
    return cells


def _run_row(record: Record) -> dict[str, Any]:
    config, train, parameters, provenance = record.config, record.train, record.parameters, record.provenance
    cells = {name: value for name, value in config if name in COLUMNS["runs"]}
    cells |= {
        "id": record.id,
        "method_options": json.dumps(config.method_options, sort_keys=True),
        "status": record.status,
        "validation": record.mean("validation"),
        "test": record.mean("test"),
        "device": provenance.device,
        "concurrent_runs": provenance.concurrent_runs,
        "time": provenance.time,
        "commit": provenance.commit,
    }
    if parameters:
        cells |= {"trainable": parameters.trainable, "adapter_bytes": parameters.adapter_bytes}
    if train:
        cells |= {
            "steps": train.steps,
            "tokens": train.tokens,
            "training_seconds": train.training_seconds,
            "evaluation_seconds": train.seconds.get("evaluation"),
            "peak_bytes": train.peak_bytes,
        }
    return cells


def _score_rows(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        for split, scores in (("validation", record.validation), ("test", record.test)):
            for task, score in (scores or {}).items():
                yield {
                    "id": record.id,
                    "split": split,
                    "task": task,
                    "metric": score.metric,
                    "score": 100 * score.value,
                    "stderr": None if score.stderr is None else 100 * score.stderr,
                    "items": score.n,
                }
