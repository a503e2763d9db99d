"""Estimate how long runs take before they start.

The estimate comes from records of the same mixture and the same base model, or one with as many weights: the median
seconds per training step, and per scored item. A run that was cut short serves as well: its steady steps count, and
what compilation and capture took beyond them is added once. Records of this machine's device and of the same method are
taken where there are any. Without such records it comes from the number of matrix operations and an assumed rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from bench.models.base import count_weights, prepare
from bench.records.schema import Record, RunConfig, TrainSection
from bench.runs.plan import Runs
from bench.runs.run import find_record
from bench.runs.setting import RunSettings, load_data
from bench.runs.work import FLOPS_PER_WEIGHT, Work, duration, work_of

# Matrix operations per second that training of a 135M model reached on a thread of a CPU, and on an H200.
ASSUMED_FLOPS_PER_THREAD = 0.05e12
ASSUMED_FLOPS_OF_GPU = 30e12
# Matrices of larger models are larger, and keep a GPU busier: a captured step of a 7B model reached 500e12 with 16,384
# tokens. A batch of two examples has some 200, so less is assumed.
WEIGHTS_OF_ASSUMED_RATE = 135e6
GROWTH_OF_RATE = 0.6  # exponent; 7B then has 310e12
MAX_ASSUMED_FLOPS_OF_GPU = 400e12


@dataclass(frozen=True)
class Estimate:
    """The estimated time of one run.

    Attributes:
        seconds: Training and scoring.
        source: What the estimate comes from.
    """

    seconds: float
    source: str


def missing_runs(runs: Runs) -> Runs:
    """Return the runs that have no record yet, each once."""
    different = {config.id: (config, setting) for config, setting in runs}
    return [(config, setting) for config, setting in different.values() if find_record(config, setting) is None]


def estimate(
    config: RunConfig, setting: RunSettings, records: Sequence[Record], device: str, jobs: int = 1
) -> Estimate:
    """Estimate the time of a run.

    Args:
        config: Configuration of the run.
        setting: Its settings.
        records: Records of the same profile, of any machine.
        device: Name of this machine's device, as in records.
        jobs: Runs at a time, which share an assumed rate.
    """
    work = work_of(config, load_data(setting, config.seed))
    weights = count_weights(prepare(setting.model))
    of_mixture = [r for r in records if r.status == "ok" and r.train and r.config.mixture == config.mixture]
    of_model = [r for r in of_mixture if r.config.model == config.model]
    alike = of_model or [r for r in of_mixture if _has_size(r, weights)]
    here = [r for r in alike if r.provenance.device == device]
    elsewhere = [r for r in alike if r.config.device_type == config.device_type]
    if found := here or elsewhere:
        of_method = [r for r in found if r.config.method == config.method]
        found = of_method or found
        name = f" of {config.method}" if of_method else " of other methods"
        devices = " and ".join(sorted({r.provenance.device for r in found}))
        crowd = round(median(r.provenance.concurrent_runs for r in found))
        together = f", {crowd} runs at a time" if crowd > 1 else ""
        count = f"{len(found)} record{'s' * (len(found) > 1)}"
        model = "" if of_model else f" with {_of_models(found)}, which is as large,"
        short = "" if any(r.complete for r in found) else ", cut short"
        return Estimate(_seconds_like(found, work), f"median of {count}{name}{model} on {devices}{together}{short}")
    rate = assumed_rate(config.device_type, weights)
    operations = (
        FLOPS_PER_WEIGHT["training"] * work.training_tokens + FLOPS_PER_WEIGHT["scoring"] * work.scored_tokens
    ) * weights
    source = f"no record of this model and mixture; {rate / 1e12:.3g} TFLOP/s assumed"
    return Estimate(
        operations * jobs / rate, f"{source} until it is measured" if _is_measured(config, work) else source
    )


def _is_measured(config: RunConfig, work: Work) -> bool:
    """Return whether the run says again before and after its first step how long it takes."""
    return config.device_type == "cpu" and work.steps > 1


def _has_size(record: Record, weights: int) -> bool:
    """Return whether a record's base model has this many weights, to a percent."""
    sizes = record.parameters
    return sizes is not None and abs(sizes.total - sizes.trainable - weights) <= 0.01 * weights


def _of_models(records: Sequence[Record]) -> str:
    return " and ".join(sorted({r.config.model for r in records}))


def assumed_rate(device_type: str, weights: float) -> float:
    """Return the matrix operations per second that are assumed for a base model of this size."""
    if device_type != "cuda":
        return ASSUMED_FLOPS_PER_THREAD * torch.get_num_threads()
    rate: float = ASSUMED_FLOPS_OF_GPU * (weights / WEIGHTS_OF_ASSUMED_RATE) ** GROWTH_OF_RATE
    return min(rate, MAX_ASSUMED_FLOPS_OF_GPU)


def _seconds_like(records: Sequence[Record], work: Work) -> float:
    """Return the time of this much work at the median speed of some records."""
    sections = [r.train for r in records if r.train]
    per_step = median(_step_seconds(train) for train in sections)
    first_steps = median(max(0.0, train.training_seconds - _step_seconds(train) * train.steps) for train in sections)
    per_item = [r.train.seconds.get("evaluation", 0.0) / max(1, _scored_items(r)) for r in records if r.train]
    return (first_steps + per_step * work.steps if work.steps else 0.0) + median(per_item) * work.items


def _step_seconds(train: TrainSection) -> float:
    """Return the seconds of a steady step; of older records, the mean over all steps."""
    return train.steady_step_seconds or train.training_seconds / train.steps


def _scored_items(record: Record) -> int:
    return sum(score.n for scores in (record.validation, record.test) for score in (scores or {}).values())


def summarize(title: str, runs: Runs, missing: Runs, estimates: Sequence[Estimate], jobs: int) -> str:
    """Return one line: how many runs are missing, and how long they take together.

    Args:
        title: Name of the command.
        runs: All runs.
        missing: The runs without a record.
        estimates: One per missing run.
        jobs: Runs at a time.
    """
    total = len({config.id for config, _ in runs})
    text = f"{title}: {len(missing)} of {total} runs to make"
    if not missing:
        return f"{text}."
    at_a_time = min(jobs, len(missing))
    together = f", {at_a_time} at a time" if at_a_time > 1 else ""
    # No number of runs at a time makes the longest one shorter.
    seconds = max(sum(e.seconds for e in estimates) / at_a_time, max(e.seconds for e in estimates))
    (source, _), *others = Counter(e.source for e in estimates).most_common()
    more = f", and {len(others)} more" if others else ""
    return f"{text}, about {duration(seconds)}{together} ({source}{more})."
