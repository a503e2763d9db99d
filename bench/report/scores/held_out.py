"""Held-out loss of a row, and its plain accuracy. Older records have no losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.records.schema import Number, Record
from bench.report.scores.balanced import BALANCED
from bench.report.scores.selection import TableRow

# `bench.report.stats` compares shares, and returns points. With losses divided by this, it returns nats.
NATS_PER_POINT = 100


def plain_accuracy(row: TableRow, task: str) -> float | None:
    """Return a row's accuracy in percent on a task whose score is balanced accuracy, else None."""
    if not all((record.test or {})[task].metric == BALANCED for record in row.records):
        return None
    outcomes = [[right > 0 for right in (record.items or {})[task]] for record in row.records]
    return 100 * sum(sum(run) / len(run) for run in outcomes) / len(outcomes)


def loss_rows(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return rows whose outcomes are losses, so that they are compared like scores; none if one has no losses.

    The mean of an item's outcome is the loss in nats per label token, divided by 100: a difference in points is one in
    nats.
    """
    if not all(record.gold for row in rows for record in row.records):
        return []
    return [replace(row, records=[_of_losses(record) for record in row.records]) for row in rows]


def _of_losses(record: Record) -> Record:
    items: dict[str, list[Number]] = {}
    for task, gold in (record.gold or {}).items():
        tokens = sum(gold.label_tokens) / len(gold.label_tokens)
        items[task] = [nats / tokens / NATS_PER_POINT for nats in gold.nats]
    return record.model_copy(update={"items": items})
