"""What a record of speed says of its rows: medians, ratios, and which row is the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from bench.records.schema import SpeedRecord, SpeedRow
from malora.backends import BACKENDS

# Rows of a large model's training that MALoRA is compared with.
COMPARED = ("peft-lora", "lora-plain-compiled", "molora-loop", "molora-sorted-compiled", "malora-fp8-liger-captured")


def summary(samples: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(samples) == 1:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low


def seconds(row: SpeedRow | None, part: str = "step") -> float | None:
    """Median of a row's samples; None if it was not measured."""
    samples = row.seconds.get(part) if row and row.status == "ok" else None
    return summary(samples)[0] if samples else None


def by_round(record: SpeedRecord, row: SpeedRow) -> np.ndarray:
    """Mean seconds of a step in each round: steps that follow each other are alike in what the device was like."""
    samples = np.array(row.seconds["step"])
    return samples.reshape(-1, max(1, len(samples) // record.options.rounds)).mean(1)


def tokens_per_second(record: SpeedRecord, row: SpeedRow | None) -> float | None:
    sequences = record.options.batch if record.mode == "decode" else 1
    return ratio(sequences * record.options.tokens, seconds(row))


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def named(record: SpeedRecord, name: str) -> SpeedRow | None:
    return next((row for row in record.rows if row.name == name), None)


def exact_rows(record: SpeedRecord) -> list[SpeedRow]:
    """Those that compute what their method says, within rounding."""
    return [row for row in record.rows if row.backend not in BACKENDS or BACKENDS[row.backend].exact]


def fastest(record: SpeedRecord, choose: Callable[[SpeedRow], bool]) -> SpeedRow | None:
    """Of the exact rows that ran."""
    ran = [r for r in exact_rows(record) if seconds(r) is not None and choose(r)]
    return min(ran, key=seconds, default=None)


def work_of(record: SpeedRecord) -> tuple[str, ...]:
    """What was asked for and on which device, whatever the rows: figures of equal works can stand side by side."""
    options = record.options
    asked = [str(getattr(options, name)) for name in ("sweep", "batch", "length", "tokens", "layers")]
    swept = options.variant if options.sweep else ""  # a sweep's rows are not beside anything
    return record.shape, record.mode, *asked, swept, record.provenance.device


def by_work(records: list[SpeedRecord]) -> list[list[SpeedRecord]]:
    """Groups in a fixed order."""
    groups: dict[tuple[str, ...], list[SpeedRecord]] = {}
    for record in records:
        groups.setdefault(work_of(record), []).append(record)
    return [groups[work] for work in sorted(groups)]


def compared(record: SpeedRecord) -> tuple[int, str, str]:
    """Sorts records by how much of what MALoRA is compared with they have, and by their age."""
    return sum(seconds(named(record, name)) is not None for name in COMPARED), *age(record)


def age(record: SpeedRecord) -> tuple[str, str]:
    return record.provenance.time, record.id


def newest(records: list[SpeedRecord]) -> list[SpeedRecord]:
    """Of records of one work the last that has most rivals, then all others of the same code or later, by age."""
    first = max(records, key=compared)
    sha = first.provenance.source_sha256
    others = (r for r in records if r.provenance.source_sha256 == sha or age(r) > age(first))
    return [first, *sorted((r for r in others if r is not first), key=age)]


def shown(records: list[SpeedRecord]) -> list[SpeedRecord]:
    """What pages show whole of each work: the first of its newest and, of others, the last with each set of rows."""
    found = []
    for first, *others in map(newest, by_work(records)):
        last = {r.options.variant: r for r in others}
        found += [first, *(r for variant, r in last.items() if variant != first.options.variant)]
    return found


def malora_row(record: SpeedRecord) -> SpeedRow | None:
    """MALoRA's fastest exact row."""
    return fastest(record, lambda row: row.method == "malora")


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"
