"""Training loss at the end of a run, which tells methods apart where accuracy is at floor.

Runs of one seed see the same batches in the same order, so their losses pair almost without noise. A lower training
loss is a better fit of the training data, not a better score on the test.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bench.records.schema import Record
from bench.report.scores.selection import TableRow
from bench.report.stats import half_width

LAST_STEPS = 200


def training_loss(record: Record) -> float | None:
    """Return the mean loss of the last steps in nats per label token, without the balance loss.

    Returns None for a record without training, for example the base model's.
    """
    if record.train is None or not record.train.curve:
        return None
    curve = record.train.curve
    return float(np.mean([point.loss for point in curve if point.step > curve[-1].step - LAST_STEPS]))


def loss_cell(row: TableRow, reference: TableRow | None) -> str:
    """Return a row's mean loss over seeds, and its difference from the reference with a 95% interval.

    The difference is paired over the seeds in common, and left out if they are fewer than two. Single-task rows have no
    loss of their own, since each of their runs trains on other data.
    """
    losses = _by_seed(row)
    if not losses:
        return ""
    mean = f"{np.mean(list(losses.values())):.3f}"
    theirs = {} if reference is None or reference is row else _by_seed(reference)
    differences = [losses[seed] - theirs[seed] for seed in sorted(losses.keys() & theirs.keys())]
    if len(differences) < 2:
        return mean
    return f"{mean}, {np.mean(differences):+.4f} ± {half_width(differences):.4f}"


def _by_seed(row: TableRow) -> Mapping[int, float]:
    if row.entry.single_task:
        return {}
    return {record.config.seed: loss for record in row.records if (loss := training_loss(record)) is not None}
