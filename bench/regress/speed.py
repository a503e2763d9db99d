"""On a GPU: a short call of `python -m bench.speed`, compared with the newest published record of the same device.

Rows are compared by their step time over that of the compiled frozen backbone in the same call. The bound is the spread
of the samples that the two ratios are made of.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bench.errors import UserError
from bench.records import store
from bench.records.provenance import device_name
from bench.records.speed_schema import SpeedRecord, SpeedRow
from bench.regress.figures import Comparison
from bench.report.speed.summary import COMPILED_BACKBONE, compared, named, ratio, seconds
from bench.speed.cli import main as run_speed

# The fastest rows of ours, and what they are compared with. Slow rows, such as the expert loop, would take minutes.
ROWS = (
    "peft-lora",
    "lora-plain-compiled",
    "lora-fused-liger-captured",
    "molora-fused-liger-captured",
    "malora-fused-liger-captured",
    "malora-fp8-liger-captured",
)
ROUNDS = 2
# Two calls of the same code differed by up to 1% in these ratios, also where the samples of each differ by less.
MIN_SPREAD = 0.03


def compare_speed(published: list[SpeedRecord]) -> tuple[list[Comparison], str]:
    """Measure on this GPU, and compare with the newest published record.

    Returns:
        The comparisons, none if there is no such record, and a remark for people.

    Raises:
        UserError: The call of `bench.speed` fails.
    """
    device = device_name(torch.device("cuda"))
    committed = newest_record(published, device)
    if committed is None:
        return [], f"speed: not compared, because no published record of training is of {device}"
    with tempfile.TemporaryDirectory() as folder:
        status = run_speed([*_arguments(committed), "--results", folder])
        fresh = store.read_speed(Path(folder))
        if status or not fresh:
            raise UserError(f"bench.speed ended with status {status} and measured nothing; its error is above.")
    return compare_ratios(committed, fresh[-1]), f"speed: compared with {committed.id}"


def newest_record(records: list[SpeedRecord], device: str) -> SpeedRecord | None:
    """Return the record to compare with: of training, on this device, with the most rows that the goals name."""
    fitting = [
        record
        for record in records
        if (record.mode, record.provenance.device, record.complete) == ("train", device, True)
        and seconds(named(record, COMPILED_BACKBONE)) is not None
    ]
    return max(fitting, key=compared, default=None)


def _arguments(record: SpeedRecord) -> list[str]:
    """Return the options of a short measurement of the record's workload."""
    options = record.options
    rows = [COMPILED_BACKBONE, *(name for name in ROWS if seconds(named(record, name)) is not None)]
    values = {
        "shape": record.shape,
        "variant": ",".join(rows),
        "batch": options.batch,
        "length": options.length,
        "tokens": options.tokens,
        "dropout": options.dropout,
        "rounds": ROUNDS,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def compare_ratios(committed: SpeedRecord, fresh: SpeedRecord) -> list[Comparison]:
    """Compare the rows of `ROWS` that the committed record has."""
    found = []
    for name in ROWS:
        before = ratio(seconds(named(committed, name)), seconds(named(committed, COMPILED_BACKBONE)))
        if before is None:
            continue
        now = ratio(seconds(named(fresh, name)), seconds(named(fresh, COMPILED_BACKBONE)))
        spread = sum(_spread(named(record, row)) for record in (committed, fresh) for row in (name, COMPILED_BACKBONE))
        limit = before * (1 + max(MIN_SPREAD, spread))
        found.append(Comparison(f"speed.{name}", before, now, f"at most {limit:.4g}", now is None or now > limit))
    return found


def _spread(row: SpeedRow | None) -> float:
    """Return the range of a row's samples over their median; 0 if it was not measured."""
    middle = seconds(row)
    if row is None or middle is None:
        return 0.0
    samples = row.seconds["step"]
    return float(max(samples) - min(samples)) / middle
