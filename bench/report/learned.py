"""Tasks that a base model can learn, and those on which it stays at chance.

A difference of methods on a task at chance is noise, and a claim that is tested there compares nothing. So a task
counts only if an adapter that is trained on it alone is better than chance.

The rule is of 1 December 2026 (`docs/notes/protocol-2026-12-01.md`) and was made when the scores of older records were
known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import hypot

from bench.records.schema import Record
from bench.report.paper import paper
from bench.report.scores.selection import TableRow
from tasks import TASKS

STANDARD_ERRORS = 3  # a task is learned if its score is further above chance than this
MIN_TASKS = 2  # a claim about fewer learned tasks is not testable
SINGLE_TASK_ROW = "LoRA (ST)"
# Choices of a question. Tasks without a fixed number, and generated answers, are compared with the untrained base.
CHOICES = {"medmcqa": 4, "arc_challenge": 4, "arc_easy": 4, "phrasebank": 3}


def learned_tasks(single_task: Record, base: Record) -> list[str]:
    """Return the tasks on which single-task training is above chance, in the record's order.

    Args:
        single_task: Test scores of an adapter for each task, trained on that task or its domain alone.
        base: Test scores of the untrained base model.
    """
    return [task for task in single_task.test or {} if _is_learned(task, single_task, base)]


def _is_learned(task: str, single_task: Record, base: Record) -> bool:
    assert single_task.test is not None
    score, start = single_task.test[task], (base.test or {}).get(task)
    chance, error = 0.0, score.stderr or 0.0
    if task in CHOICES:
        chance = 1 / CHOICES[task]
    elif start is not None:
        chance, error = start.value, hypot(error, start.stderr or 0.0)
    return score.value - chance > STANDARD_ERRORS * error


def on_tasks(row: TableRow, tasks: Sequence[str]) -> TableRow:
    """Return a row whose scores are of these tasks only."""
    records = [
        record.replace(
            test={task: score for task, score in (record.test or {}).items() if task in tasks},
            items={task: outcomes for task, outcomes in (record.items or {}).items() if task in tasks},
        )
        for record in row.records
    ]
    return replace(row, records=records)


def paper_difference(table: str, first: str, second: str, tasks: Sequence[str] | None = None) -> float:
    """Return the paper's second row less its first, in points.

    Args:
        table: Name of the paper's table.
        first: Title of a row.
        second: Title of a row.
        tasks: Names of the tasks to average; None for the mean that the paper prints.
    """
    rows = paper()[table]
    if tasks is None:
        return float(rows[second]["AVG"] - rows[first]["AVG"])
    titles = [TASKS[task].title for task in tasks]
    return float(sum(rows[second][title] - rows[first][title] for title in titles) / len(titles))
