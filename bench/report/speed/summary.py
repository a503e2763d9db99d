"""Statistics of speed records.

They are medians, ratios, the fastest row, and the records that count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from bench.records.speed_schema import SpeedRecord, SpeedRow
from malora.backends import BACKENDS

COMPILED_BACKBONE = "floor-compiled"  # the row of the frozen backbone, compiled
PEFT_LORA = "peft-lora"  # the row of PEFT's LoRA out of the box
# Rows of a large model's training that the goals compare MALoRA with.
COMPARED = (PEFT_LORA, "lora-plain-compiled", "molora-loop", "molora-sorted-compiled", "malora-fp8-liger-captured")


def median_and_iqr(samples: list[float]) -> tuple[float, float]:
    """Return the median and the interquartile range."""
    if len(samples) == 1:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low


def seconds(row: SpeedRow | None, phase: str = "step") -> float | None:
    """Return the median seconds of a phase, or None if it was not measured."""
    samples = row.seconds.get(phase) if row and row.status == "ok" else None
    return median_and_iqr(samples)[0] if samples else None


def rows_by_seconds(record: SpeedRecord) -> list[tuple[float, SpeedRow]]:
    """Return the rows that ran with the median seconds of their step.

    The slowest comes first.
    """
    timed = ((seconds(row), row) for row in record.rows)
    return sorted(((step, row) for step, row in timed if step is not None), key=lambda pair: -pair[0])


def by_round(record: SpeedRecord, row: SpeedRow) -> np.ndarray:
    """Return the mean seconds per step of each round.

    Steps within a round are not independent samples.
    """
    samples = np.array(row.seconds["step"])
    means: np.ndarray = samples.reshape(-1, max(1, len(samples) // record.options.rounds)).mean(1)
    return means


def tokens_per_second(record: SpeedRecord, row: SpeedRow | None) -> float | None:
    """Return the tokens that a row processes per second.

    In decode, they are over all sequences of the batch. On several GPUs they are those of all of them.
    """
    sequences = record.options.batch if record.mode == "decode" else 1
    gpus = (row.world if row else None) or 1
    return ratio(gpus * sequences * record.options.tokens, seconds(row))


def ratio(above: float | None, below: float | None) -> float | None:
    """Return above / below, or None if one is unknown, or `below` is 0."""
    return None if above is None or not below else above / below


def named(record: SpeedRecord, name: str) -> SpeedRow | None:
    """Return the row of this name, if the record has it."""
    return next((row for row in record.rows if row.name == name), None)


def exact_rows(record: SpeedRecord) -> list[SpeedRow]:
    """Return the rows that compute their method up to rounding, which float8 does not."""
    return [row for row in record.rows if row.backend not in BACKENDS or BACKENDS[row.backend].exact]


def fastest(record: SpeedRecord, choose: Callable[[SpeedRow], bool]) -> SpeedRow | None:
    """Return the fastest of the exact rows that ran and that `choose` accepts."""
    timed = [(step, row) for row in exact_rows(record) if choose(row) and (step := seconds(row)) is not None]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def malora_row(record: SpeedRecord) -> SpeedRow | None:
    """Return MALoRA's fastest exact row on one GPU."""
    return fastest(record, lambda row: row.method == "malora" and row.parallel is None)


def work_of(record: SpeedRecord) -> tuple[str, ...]:
    """Return the workload and the device. Records that agree in both can be compared."""
    options = record.options
    asked = [str(getattr(options, name)) for name in ("sweep", "batch", "length", "tokens", "layers", "world")]
    swept = options.variant if options.sweep else ""  # the rows of two sweeps are not compared
    return record.shape, record.mode, *asked, swept, record.provenance.device


def by_work(records: list[SpeedRecord]) -> list[list[SpeedRecord]]:
    """Group records by workload and device, in a fixed order."""
    groups: dict[tuple[str, ...], list[SpeedRecord]] = {}
    for record in records:
        groups.setdefault(work_of(record), []).append(record)
    return [groups[work] for work in sorted(groups)]


def compared(record: SpeedRecord) -> tuple[int, str, str]:
    """Return a sort key: how many rows of `COMPARED` the record has, then its age."""
    return sum(seconds(named(record, name)) is not None for name in COMPARED), *age(record)


def age(record: SpeedRecord) -> tuple[str, str]:
    """Return a sort key that puts the oldest record first."""
    return record.provenance.time, record.id


def newest(records: list[SpeedRecord]) -> list[SpeedRecord]:
    """Return the records of one workload that count.

    The first is the newest of those with the most rows of `COMPARED`. The others, by age, were made by the same code or
    later than the first.
    """
    first = max(records, key=compared)
    sha = first.provenance.source_sha256
    others = (r for r in records if r.provenance.source_sha256 == sha or age(r) > age(first))
    return [first, *sorted((r for r in others if r is not first), key=age)]


def shown(records: list[SpeedRecord]) -> list[SpeedRecord]:
    """Return the records that pages show in full.

    For each workload these are the first of its `newest` records and, for each other set of variants, the last one.
    """
    found = []
    for first, *others in map(newest, by_work(records)):
        last = {r.options.variant: r for r in others}
        found += [first, *(r for variant, r in last.items() if variant != first.options.variant)]
    return found
