"""Benchmark all variants in interleaved rounds.

Each round times every variant once. Every second round goes in reverse order, so that drift of the device affects all
variants equally. Before each measurement a GPU is warmed up with large matmuls. A GPU at its power limit lowers its
clock as it gets hotter: without the warm-up one variant took 0.86 s per step after a pause, and 0.89 s later.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from bench.errors import UserError
from bench.speed.profiler import profile_step, time_steps, wall_seconds, warm_device
from bench.speed.sensors import Sensors
from bench.speed.steps import STEPS, PhaseCallback, Workload, ignore_phase
from bench.speed.subject import Subject
from bench.speed.variants import Variant

# A step above this is slow. A slow variant needs no warm-up steps, and is timed in two rounds only.
SLOW_SECONDS = 10.0
# A variant's time per round: matmuls that heat the GPU, steps that are not timed, and steps that are timed.
DEVICE_WARM_SECONDS, WARM_SECONDS, ROUND_SECONDS = 2.0, 1.0, 3.0
MAX_STEPS = 10  # per row and round, timed and untimed each: more would add samples but no information
MAX_REASON = 300  # characters of an error message in a record

# Many variants share the code of one decoder layer, more than torch.compile expects by default. Past its limit it would
# silently run a variant eagerly, so reaching the limit is an error.
COMPILE_OPTIONS = {
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 1024,
    "fail_on_recompile_limit_hit": True,
}

Step = Callable[[PhaseCallback], Any]
Result = dict[str, Any]  # a row of a record, while it is measured


class BenchmarkRow(Protocol):
    """A row of a record: a variant, at one value of a sweep.

    It is measured once per round. Between two sessions it keeps its compiled code and gives its device memory back.

    Attributes:
        about: Fields of the row that are known before it is measured.
        work: The work of a step.
        batch: Sequences per pass. It is halved when training does not fit into memory.
    """

    about: dict[str, Any]
    work: Workload
    batch: int

    def session(self) -> AbstractContextManager[Step]:
        """Make the row ready on the device inside `with`, and return its step."""


class ModelRow:
    """A variant on the whole backbone."""

    def __init__(self, variant: Variant, base: PreTrainedModel, work: Workload) -> None:
        self.variant, self.base, self.work, self.batch = variant, base, work, work.batch
        self.subject: Subject | None = None
        self.about: dict[str, Any] = dataclasses.asdict(variant)

    @contextmanager
    def session(self) -> Iterator[Step]:
        """Build the model the first time, load it, and park it at the end."""
        if self.subject is None:
            self.subject = Subject(self.variant, self.base, self.work.mode, self.work.dropout)
            self.about |= {"trainable": self.subject.trainable, "autocast": self.subject.autocast}
        self.subject.load()
        try:
            yield STEPS[self.work.mode](self.subject, self.work, self.batch)
        finally:
            self.subject.park()


def measure(
    rows: Sequence[BenchmarkRow], rounds: int, device: torch.device, seconds: float = math.inf
) -> tuple[list[Result], int]:
    """Warm up every row, then time all of them in rounds.

    A row that cannot run gets a reason, and the others go on. After the first round, no round is started that would end
    later than `seconds` from now if it took as long as the one before.

    Returns:
        One dict per row, and the number of rounds. A dict has `BenchmarkRow.about`, "status" (ok, oom, failed or
        unavailable), samples of seconds by phase, medians of the sensors by round, peak memory in bytes over the timed
        rounds, and the counts of `profile_step`.
    """
    start = time.perf_counter()
    results = [_first_pass(row, device) for row in rows]
    done, round_start = 0, time.perf_counter()
    for number in range(rounds):
        now = time.perf_counter()
        if done and now + (now - round_start) > start + seconds:
            break
        done, round_start = number + 1, now
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        pairs = [*zip(rows, results, strict=True)]
        for row, result in reversed(pairs) if number % 2 else pairs:
            slow = result["status"] == "ok" and result["warm_seconds"] > SLOW_SECONDS
            if result["status"] == "ok" and not (slow and number >= 2):
                guarded(result, device, _round, row, result, rounds, device)
    return results, done


def _first_pass(row: BenchmarkRow, device: torch.device) -> Result:
    """Build, compile and profile a row.

    Halve the micro-batch until training fits into memory.
    """
    result: Result = {"status": "ok", "reason": None, "seconds": {}, "sensors": {}, "peak_bytes": None}
    while True:
        guarded(result, device, _warm_up, row, result, device)
        if result["status"] != "oom" or row.batch == 1 or row.work.mode != "train":
            break
        row.batch = row.batch // 2 if row.batch % 2 == 0 else 1
        result |= {"status": "ok", "reason": f"micro-batches of {row.batch}: more did not fit into memory"}
    result |= row.about | {"batch": row.batch}
    note = f"{result['warm_seconds']:.3f} s" if result["status"] == "ok" else f"{result['status']}: {result['reason']}"
    print(f"{result['name']}: {note}", file=sys.stderr, flush=True)
    return result


def _warm_up(row: BenchmarkRow, result: Result, device: torch.device) -> None:
    """Run a row until it is warm, and record how long a warm step takes."""

    def first() -> None:
        with row.session() as step:
            result["first_seconds"] = result["warm_seconds"] = wall_seconds(lambda: step(ignore_phase), device)
            if result["first_seconds"] <= SLOW_SECONDS or row.about.get("run") != "eager":  # others compile or capture
                result["warm_seconds"] = wall_seconds(lambda: step(ignore_phase), device)
            profiled = wall_seconds(lambda: result.update(profile_step(step, device)), device)
            if device.type == "cuda":  # on a CPU profiling runs no step
                # An eager row may compile Triton kernels for many seconds in its first step and be fast afterwards.
                result["warm_seconds"] = min(result["warm_seconds"], profiled)

    result["build_seconds"] = wall_seconds(first, device)  # including compilation


def _round(row: BenchmarkRow, result: Result, rounds: int, device: torch.device) -> None:
    """Time a row in one round and add the samples to its result."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with row.session() as step:
        warm_device(device, DEVICE_WARM_SECONDS)
        if result["warm_seconds"] <= SLOW_SECONDS:
            for _ in range(_steps_in(WARM_SECONDS, result)):  # they also fill the allocator, which starts empty
                step(ignore_phase)
        samples = max(1 if rounds > 1 else 2, _steps_in(ROUND_SECONDS, result))
        with Sensors(device) as sensors:  # includes warm-up steps that the device has not finished
            timed = time_steps(step, samples, device)
        for sample in timed:
            for phase, seconds in sample.items():
                result["seconds"].setdefault(phase, []).append(seconds)
        for reading, value in (sensors.medians() or {}).items():
            result["sensors"].setdefault(reading, []).append(value)
    if device.type == "cuda":
        peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        before = result["peak_bytes"] or peak
        result["peak_bytes"] = {kind: max(value, before[kind]) for kind, value in peak.items()}


def _steps_in(seconds: float, result: Result) -> int:
    return max(1, min(MAX_STEPS, int(seconds / result["warm_seconds"])))


def guarded(result: Result, device: torch.device, run: Callable[..., None], *arguments: Any) -> None:
    """Run a pass of a row, and free the device's memory.

    An exception is turned into the row's status and reason.
    """
    try:
        run(*arguments)
    except torch.OutOfMemoryError as error:
        result |= {"status": "oom", "reason": _first_line(error)}
    except UserError as error:
        result |= {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # compilers and graph capture raise all kinds of errors, and other rows must go on
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
    clear_device_cache(garbage_collection=True)  # the row's CUDA graphs die only here, and free their memory


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:MAX_REASON]
