"""What a record of speed says of its rows: medians, ratios, and which row is the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.record import SpeedRecord
from malora.backends import INEXACT

Row = dict[str, Any]


def summary(samples: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(samples) == 1:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low


def seconds(row: Row | None, part: str = "step") -> float | None:
    """Median of a row's samples; None if it was not measured."""
    samples = row["seconds"].get(part) if row and row["status"] == "ok" else None
    return summary(samples)[0] if samples else None


def by_round(record: SpeedRecord, row: Row) -> np.ndarray:
    """Mean seconds of a step in each round: steps that follow each other are alike in what the device was like."""
    samples = np.array(row["seconds"]["step"])
    return samples.reshape(-1, max(1, len(samples) // record.options["rounds"])).mean(1)


def tokens_per_second(record: SpeedRecord, row: Row | None) -> float | None:
    sequences = record.options["batch"] if record.mode == "decode" else 1
    return ratio(sequences * record.options["tokens"], seconds(row))


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def named(record: SpeedRecord, name: str) -> Row | None:
    return next((row for row in record.rows if row["name"] == name), None)


def exact_rows(record: SpeedRecord) -> list[Row]:
    """Those that compute what their method says, within rounding."""
    return [row for row in record.rows if row["backend"] not in INEXACT]


def fastest(record: SpeedRecord, choose: Callable[[Row], bool]) -> Row | None:
    """Of the exact rows that ran."""
    ran = [r for r in exact_rows(record) if seconds(r) is not None and choose(r)]
    return min(ran, key=seconds, default=None)


def latest(records: list[SpeedRecord]) -> list[SpeedRecord]:
    """Of the calls that asked for the same on the same device, the last one each; in a fixed order."""
    kept: dict[tuple, SpeedRecord] = {}
    for record in sorted(records, key=lambda r: (r.provenance["time"], r.id)):
        asked = (str(record.options[k]) for k in ("variant", "sweep", "batch", "length", "tokens", "layers"))
        kept[record.shape, record.mode, *asked, record.provenance["device"]] = record
    return [kept[key] for key in sorted(kept)]


def malora_row(record: SpeedRecord) -> Row | None:
    """MALoRA's fastest exact row."""
    return fastest(record, lambda row: row["method"] == "malora")


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"
