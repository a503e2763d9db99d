"""Time training programs in rounds, by the wall clock.

Each round runs every program once, from its base model on, and every second round goes in reverse order. A program has
this process's memory for itself, so its peak is what a user sees. Time is that of a whole optimizer step: the device is
synchronized before and after each one, so the host's time counts where the device waits for it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.models.backbone import Shape, backbone
from bench.models.quantized import QUANTIZED
from bench.speed.loops.programs import MicroBatch
from bench.speed.loops.rows import LoopRow
from bench.speed.profiler import profile_step, wall_seconds, warm_device
from bench.speed.rounds import DEVICE_WARM_SECONDS, MAX_REASON, MAX_STEPS, ROUND_SECONDS, Result, guarded
from bench.speed.sensors import Sensors
from bench.speed.steps import Workload

WARM_STEPS = 3  # after the first: a captured program with one micro-batch per step replays from its third step on
MIN_STEPS = 3  # timed, in each round


class Program(Protocol):
    """A training program that is ready to run."""

    def step(self) -> float:
        """Run an optimizer step and return its seconds."""

    def warm(self, seconds: float) -> None:
        """Keep the GPUs that it runs on busy with large matmuls."""

    def loss(self) -> float:
        """Return the loss of the last step."""

    def peak_bytes(self) -> dict[str, int] | None:
        """Return the peak of allocated and reserved GPU memory since the start; None on a CPU."""

    def counts(self) -> dict[str, Any]:
        """Return the fields of `profile_step`."""


class Row(Protocol):
    """A row of the record.

    Attributes:
        about: Fields of the row that are known before it is measured.
    """

    about: dict[str, Any]

    def opened(self) -> AbstractContextManager[Program]:
        """Return a context with the program, which has all memory to itself."""


class LocalProgram:
    """A program in this process. See `Program`."""

    def __init__(self, losses: Generator[Tensor], device: torch.device, before: dict[str, int]) -> None:
        self.losses, self.device, self.before = losses, device, before
        self.last: Tensor | None = None

    def step(self) -> float:  # noqa: D102
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return wall_seconds(self._next, self.device)

    def warm(self, seconds: float) -> None:  # noqa: D102
        warm_device(self.device, seconds)

    def loss(self) -> float:  # noqa: D102
        assert self.last is not None, "a step has been run"
        return self.last.item()

    def peak_bytes(self) -> dict[str, int] | None:  # noqa: D102
        if self.device.type != "cuda":
            return None
        peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        return {kind: size - self.before[kind] for kind, size in peak.items()}

    def counts(self) -> dict[str, Any]:  # noqa: D102
        return profile_step(lambda _: self._next(), self.device)

    def _next(self) -> None:
        self.last = next(self.losses).detach()


class LocalRow:
    """A row whose program runs in this process. See `Row`.

    Args:
        row: What to run.
        shape: Shape of the backbone.
        layers: Number of its layers, or None for all.
        work: The work of a step, in each process.
        device: Where the program runs.
        place: Rank of this process, and number of processes that train the row together.
    """

    def __init__(
        self,
        row: LoopRow,
        shape: Shape,
        layers: int | None,
        work: Workload,
        device: torch.device,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self.row, self.shape, self.layers, self.work, self.device = row, shape, layers, work, device
        self.place = place
        self.about = row.about
        if row.weights in QUANTIZED and find_spec("bitsandbytes"):
            self.about |= {"package": f"bitsandbytes {version('bitsandbytes')}"}

    @contextmanager
    def opened(self) -> Iterator[Program]:  # noqa: D102
        before = {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what a row before has freed would count as reserved
            torch.cuda.reset_peak_memory_stats()
            # What the libraries keep from the rows before, such as workspaces.
            before = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        # The program alone holds the base model.
        losses = self.row.program(self._base(), batches(self.work, self.device, *self.place), self.work.dropout)
        try:
            yield LocalProgram(losses, self.device, before)
        finally:
            losses.close()
            torch.compiler.reset()

    def _base(self) -> PreTrainedModel:
        """Return the base model where a user of the program loads it."""
        base = backbone(self.shape, self.layers, self.device, self.row.weights)
        if self.row.parallel != "fsdp":
            return base
        base = base.cpu()  # FSDP2 brings it to the GPU layer by layer. Random weights are drawn much faster on the GPU.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # a whole model on one GPU is no part of the program
        return base


def batches(work: Workload, device: torch.device, rank: int = 0, world: int = 1) -> Iterator[list[MicroBatch]]:
    """Yield the same random micro-batches for each optimizer step. Those of two processes differ."""
    of_all = dataclasses.replace(work, tokens=world * work.tokens).ids(work.batch, device)
    ids = of_all.chunk(world)[rank]
    while True:
        yield [{"input_ids": micro_batch, "labels": micro_batch} for micro_batch in ids]


def measure(
    rows: Sequence[Row],
    rounds: int,
    device: torch.device,
    save: Callable[[list[Result], int], object],
    seconds: float = math.inf,
) -> None:
    """Time all rows in rounds. A row that cannot run gets a reason, and the others go on.

    Args:
        rows: The rows.
        rounds: Number of rounds.
        device: Where they run.
        save: Called after each row with the results so far, one per row, and the number of rounds that have begun.
        seconds: No round is started that would end later from now, if it took as long as the one before.
    """
    start = round_start = time.perf_counter()
    results: dict[int, Result] = {}
    for number in range(rounds):
        now = time.perf_counter()
        if number and now + (now - round_start) > start + seconds:
            break
        round_start = now
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        order = range(len(rows))
        for place in reversed(order) if number % 2 else order:
            row = rows[place]
            result = results.setdefault(place, {"status": "ok", "reason": None, "seconds": {}, **row.about})
            if result["status"] != "ok":
                continue
            guarded(result, device, _turn, row, result, device)
            result |= row.about  # the version of another package is known once its worker runs
            print(f"{result['name']}: {_outcome(result)}", file=sys.stderr, flush=True)
            save([results[place] for place in sorted(results)], number + 1)


def _turn(row: Row, result: Result, device: torch.device) -> None:
    """Run a program, and add its samples to the result. Its reason is what our package warned of."""
    with our_warnings() as messages, row.opened() as program:
        start = time.perf_counter()
        program.step()
        result.setdefault("first_seconds", time.perf_counter() - start)  # it makes the adapter, and compiles
        program.warm(DEVICE_WARM_SECONDS)
        warm = min(program.step() for _ in range(WARM_STEPS))
        count = max(MIN_STEPS, min(MAX_STEPS, int(ROUND_SECONDS / warm)))
        with Sensors(device) as sensors:
            result["seconds"].setdefault("step", []).extend(program.step() for _ in range(count))
        for reading, value in (sensors.medians() or {}).items():
            result.setdefault("sensors", {}).setdefault(reading, []).append(value)
        if peak := program.peak_bytes():
            before = result.get("peak_bytes") or peak
            result["peak_bytes"] = {kind: max(value, before[kind]) for kind, value in peak.items()}
        result["loss"] = program.loss()
        result["reason"] = " ".join(dict.fromkeys(messages))[:MAX_REASON] or None  # such as: could not be captured
        if "kernels" not in result:  # last, because the profiler takes memory
            result |= program.counts()


@contextmanager
def our_warnings() -> Iterator[list[str]]:
    """Collect the warnings that malora logs inside `with`."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("malora")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def _outcome(result: Result) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    peak = result.get("peak_bytes")
    memory = f", {peak['allocated'] / 2**30:.1f} GiB" if peak else ""
    note = f" ({result['reason']})" if result["reason"] else ""
    return f"{min(result['seconds']['step']):.4f} s{memory}{note}"
