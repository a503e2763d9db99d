"""How far a mean moves on another processor, as measured.

Processors add the terms of a matmul in other orders. Training amplifies these differences of rounding, the more the
higher the learning rate is. `processors.json` has the scores of runs that were made again as on other processors, with
the base, data and seed of a published record. `docs/notes/2026-12-processors.md` describes the measurement.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from bench.records.schema import RunConfig
from bench.report.stats import LEVEL

FILE = Path(__file__).with_name("processors.json")


@cache
def measured() -> dict[str, Any]:
    """Return the contents of `processors.json`."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def differences(config: RunConfig) -> list[float]:
    """Return by how many points measured runs like this one moved.

    They are of the same profile, mixture and learning rate, of any method.
    """
    content = measured()
    if (config.profile, config.mixture) != (content["profile"], content["mixture"]):
        return []
    return [run["score"] - run["published"] for run in content["runs"] if run["rate"] == config.learning_rate]


def half_width(config: RunConfig, seeds: int) -> float | None:
    """Return half of the interval in which the mean over these seeds falls on another processor in 95% of cases.

    It is by Student's t, around the published mean of the same seeds. None if it was not measured.
    """
    found = differences(config)
    if len(found) < 2:
        return None
    deviation = math.sqrt(sum(value**2 for value in found) / len(found))
    return float(student.ppf((1 + LEVEL) / 2, len(found))) * deviation / math.sqrt(seeds)
