"""The training loss of a row, and its paired difference."""

import pytest

from bench.experiments.registry import TableEntry
from bench.report.scores.selection import TableRow
from bench.report.scores.training_loss import loss_cell, training_loss
from tests.bench.records.test_store import make


def run(seed, late, method="lora"):
    """A record of 300 steps, whose last 200 have the given losses."""
    losses = [(100, 9.0), (110, late - 0.1), (300, late + 0.1)]
    record = make(seed, method=method)
    curve = [{"step": step, "loss": loss, "balance_loss": 1.0, "grad_norm": 1.0} for step, loss in losses]
    return record.replace(train=record.train.model_validate(record.train.model_dump() | {"curve": curve}))


def row(losses, method="lora", single_task=False):
    records = [run(seed, loss, method) for seed, loss in losses.items()]
    return TableRow(TableEntry(method, single_task=single_task), 2e-3, records, [], records)


def test_the_last_200_steps_count():
    assert training_loss(run(0, 2.0)) == pytest.approx(2.0)
    assert training_loss(make(0, method="base", rate=None, train=None)) is None


def test_the_difference_is_paired_over_the_seeds_in_common():
    """The differences are 0.1, 0.2 and 0.3: mean 0.2, standard error 0.1/√3, t(0.975, 2) = 4.3027."""
    reference = row({0: 1.0, 1: 2.0, 2: 4.0, 3: 9.0})
    assert loss_cell(row({0: 1.1, 1: 2.2, 2: 4.3}, "molora"), reference) == "2.533, +0.2000 ± 0.2484"
    assert loss_cell(row({0: 1.1}, "molora"), reference) == "1.100"
    assert loss_cell(reference, reference) == "4.000"
    assert loss_cell(row({0: 1.1, 1: 2.0}, single_task=True), reference) == ""
