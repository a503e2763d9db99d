"""Rows that are measured in turns: every round times each of them, so that drift of the device hits all alike. Every
second round goes from the last row to the first, and a GPU is brought to the same heat before each turn.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from bench.errors import UserError
from bench.speed.profiler import count, time_steps, wall_seconds, warm_device
from bench.speed.sensors import Sensors
from bench.speed.steps import STEPS, PhaseCallback, Workload
from bench.speed.subject import Subject
from bench.speed.variants import Variant

SLOW_SECONDS = 10.0  # a step; such a row is warm from its first pass, and gets two samples
# A row's share of a round: products that heat a GPU, steps that are not timed, and steps that are. A board at the limit
# of its power lowers its clock, and more so the hotter it is; after a pause a row took 0.86 s for a step, later 0.89.
HEAT_SECONDS, WARM_SECONDS, ROUND_SECONDS = 2.0, 1.0, 3.0
MOST_STEPS = 10  # of either kind, a round

Step = Callable[[PhaseCallback], Any]


class BenchmarkRow(Protocol):
    """A row that can be entered as often as there are rounds. What it compiled it keeps, its memory it gives back."""

    about: dict[str, Any]  # what the record says of it
    batch: int

    def session(self) -> Any: ...


class ModelRow:
    """A variant on the whole backbone."""

    def __init__(self, variant: Variant, base: PreTrainedModel, work: Workload) -> None:
        self.variant, self.base, self.work, self.batch = variant, base, work, work.batch
        self.subject: Subject | None = None
        self.about: dict[str, Any] = dataclasses.asdict(variant)

    @contextmanager
    def session(self) -> Iterator[Step]:
        if self.subject is None:
            self.subject = Subject(self.variant, self.base, self.work.mode, self.work.dropout)
            self.about |= {"trainable": self.subject.trainable, "autocast": self.subject.autocast}
        self.subject.load()
        try:
            yield STEPS[self.work.mode](self.subject, self.work, self.batch)
        finally:
            self.subject.park()


def measure(
    rows: list[BenchmarkRow], rounds: int, device: torch.device, seconds: float = math.inf
) -> tuple[list[dict[str, Any]], int]:
    """Warms every row up, then times all of them in `rounds` rounds. A row that cannot run says why; the others go on.

    After the first round none is begun that would end later than `seconds` from now, going by the round before.

    Returns:
        How many rounds there were, behind a dict a row: what it is, status (ok, oom, failed, unavailable), samples of
        seconds by part, medians of the sensors by round, peak memory in bytes over the timed rounds, and what `count`
        counted.
    """
    start = time.perf_counter()
    found = [_first_pass(row, device) for row in rows]
    done, began = 0, time.perf_counter()
    for number in range(rounds):
        now = time.perf_counter()
        if done and now + (now - began) > start + seconds:
            break
        done, began = number + 1, now
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        turn = [*zip(rows, found, strict=True)]
        for row, result in reversed(turn) if number % 2 else turn:
            slow = result["status"] == "ok" and result["warm_seconds"] > SLOW_SECONDS
            if result["status"] == "ok" and not (slow and number >= 2):
                _guarded(result, device, _round, row, result, rounds, device)
    return found, done


def _first_pass(row: BenchmarkRow, device: torch.device) -> dict[str, Any]:
    """Builds, compiles and counts. Training that does not fit is tried with half the micro-batch, until one fits."""
    result: dict[str, Any] = {"status": "ok", "reason": None, "seconds": {}, "sensors": {}, "peak_bytes": None}
    while True:
        _guarded(result, device, _warm_up, row, result, device)
        if result["status"] != "oom" or row.batch == 1 or row.work.mode != "train":
            break
        row.batch = row.batch // 2 if row.batch % 2 == 0 else 1
        result |= {"status": "ok", "reason": f"micro-batches of {row.batch}: more did not fit into memory"}
    result |= row.about | {"batch": row.batch}
    note = f"{result['warm_seconds']:.3f} s" if result["status"] == "ok" else f"{result['status']}: {result['reason']}"
    print(f"{result['name']}: {note}", file=sys.stderr, flush=True)
    return result


def _warm_up(row: BenchmarkRow, result: dict[str, Any], device: torch.device) -> None:
    def first() -> None:
        with row.session() as step:
            result["first_seconds"] = result["warm_seconds"] = wall_seconds(lambda: step(_ignore), device)
            if result["first_seconds"] <= SLOW_SECONDS or row.about.get("run") != "eager":  # others compile or capture
                result["warm_seconds"] = wall_seconds(lambda: step(_ignore), device)
            counted = wall_seconds(lambda: result.update(count(step, device)), device)
            if device.type == "cuda":  # elsewhere counting makes no pass
                # Triton may have compiled kernels in a first pass of many seconds, which is no sign of a slow row.
                result["warm_seconds"] = min(result["warm_seconds"], counted)

    result["build_seconds"] = wall_seconds(first, device)  # compiling included


def _round(row: BenchmarkRow, result: dict[str, Any], rounds: int, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with row.session() as step:
        warm_device(device, HEAT_SECONDS)
        if result["warm_seconds"] <= SLOW_SECONDS:
            for _ in range(_steps_in(WARM_SECONDS, result)):  # the allocator starts empty, too
                step(_ignore)
        samples = max(1 if rounds > 1 else 2, _steps_in(ROUND_SECONDS, result))
        with Sensors(device) as sensors:  # warm-ups that the device is not done with are read, too
            timed = time_steps(step, samples, device)
        for sample in timed:
            for part, seconds in sample.items():
                result["seconds"].setdefault(part, []).append(seconds)
        for reading, value in (sensors.medians() or {}).items():
            result["sensors"].setdefault(reading, []).append(value)
    if device.type == "cuda":
        peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        before = result["peak_bytes"] or peak
        result["peak_bytes"] = {kind: max(value, before[kind]) for kind, value in peak.items()}


def _steps_in(seconds: float, result: dict[str, Any]) -> int:
    return max(1, min(MOST_STEPS, int(seconds / result["warm_seconds"])))


def _guarded(result: dict[str, Any], device: torch.device, run: Callable[..., None], *arguments: Any) -> None:
    """Runs a pass of a row; what it raises becomes the row's status and reason. What it took is free for the next."""
    try:
        run(*arguments)
    except torch.OutOfMemoryError as error:
        result |= {"status": "oom", "reason": _first_line(error)}
    except UserError as error:
        result |= {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # a library's compiler or capture raises whatever it likes, and the others go on
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
    clear_device_cache(garbage_collection=True)  # its graphs are only gone now, and the memory that they hold with them


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


def _ignore(part: str) -> None:
    """A warm-up's parts are nobody's."""
