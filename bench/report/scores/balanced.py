"""Balanced accuracy in place of accuracy, where the classes of a test set are uneven."""

from __future__ import annotations

import pandas as pd

from bench.records.schema import Record

BALANCED = "balanced accuracy"  # name of the metric


def with_balanced_accuracy(frame: pd.DataFrame) -> pd.DataFrame:
    """Replace accuracy by balanced accuracy where the classes of a test set are uneven.

    The outcomes of such a task are weighted, so that their mean is the balanced accuracy. Nothing changes if any record
    with scores lacks classes, because the rows of a table must have the same score.

    Args:
        frame: Comparable records.
    """
    records = list(frame["record"])
    if not records or not all(record.gold for record in records if record.test):
        return frame
    balanced = [_balanced(record) for record in records]
    return frame.assign(record=balanced, test=[record.mean("test") for record in balanced])


def _balanced(record: Record) -> Record:
    scores, items = dict(record.test or {}), dict(record.items or {})
    for task, score in scores.items():
        weights = record.gold[task].class_weights() if record.gold else None
        if score.is_uneven and weights:
            scores[task] = score.replace(metric=BALANCED, value=score.balanced)
            items[task] = [weight * right for weight, right in zip(weights, items[task], strict=True)]
    return record.model_copy(update={"test": scores, "items": items}) if record.test else record
