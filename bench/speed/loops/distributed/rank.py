"""A process of a distributed row: it trains with one GPU, or with the CPU, one optimizer step per command.

`bench.speed.loops.worker_process` says how commands and answers travel. All processes get the same commands:

| command | answer |
| --- | --- |
| {"do": "join", "rank": ..., "world": ..., "store": path, "device": "cuda" or "cpu"} | {"process": id} |
| {"do": "prepare", "row": name, "shape": name, "layers": ..., "work": fields of `Workload`} | {} |
| {"do": "warm", "seconds": ...} | {}: a GPU has been busy with large matmuls |
| {"do": "step"} | {"seconds": ..., "loss": ..., "warnings": [what malora has logged]} |
| {"do": "peak"} | {"peak": {"allocated": ..., "reserved": ...}} in bytes, or {"peak": null} on a CPU |
| {"do": "rest"} | {}: the program has ended and its memory is free |
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import distributed

from bench.models.backbone import SHAPES
from bench.speed.loops.rounds import LocalRow, Program, our_warnings
from bench.speed.loops.rows import all_rows
from bench.speed.profiler import warm_device
from bench.speed.rounds import COMPILE_OPTIONS
from bench.speed.steps import Workload
from malora.fused.availability import warn_once

TIMEOUT = timedelta(minutes=10)  # of a collective; a first step may compile for minutes


class Rank:
    """Answers the commands. The methods are named after them."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.number, self.world = 0, 1
        self.stack = ExitStack()  # of the program
        self.program: Program | None = None
        self.messages: list[str] = []

    def join(self, rank: int, world: int, store: str, device: str) -> dict[str, Any]:
        """Connect this process with the others."""
        self.number, self.world = rank, world
        on_gpu = device == "cuda"
        if on_gpu:
            self.device = torch.device("cuda", rank)
            torch.cuda.set_device(self.device)
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=self.device if on_gpu else None,
        )
        return {"process": os.getpid()}

    def prepare(self, row: str, shape: str, layers: int | None, work: dict[str, Any]) -> dict[str, Any]:
        """Make the base model. The program adds its adapter in the first step."""
        warn_once.cache_clear()  # each program says anew what it cannot do
        self.messages = self.stack.enter_context(our_warnings())
        place = self.number, self.world
        opened = LocalRow(all_rows()[row], SHAPES[shape], layers, Workload(**work), self.device, place).opened()
        self.program = self.stack.enter_context(opened)
        return {}

    def warm(self, seconds: float) -> dict[str, Any]:
        """Keep the GPU busy."""
        warm_device(self.device, seconds)
        return {}

    def step(self) -> dict[str, Any]:
        """Run an optimizer step, which begins in all processes at once."""
        assert self.program is not None, "prepared"
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()
        seconds = self.program.step()
        found, self.messages[:] = [*self.messages], []
        return {"seconds": seconds, "loss": self.program.loss(), "warnings": found}

    def peak(self) -> dict[str, Any]:
        """Return the peak of GPU memory since the start of the program."""
        assert self.program is not None, "prepared"
        return {"peak": self.program.peak_bytes()}

    def rest(self) -> dict[str, Any]:
        """End the program."""
        self.program = None
        self.stack.close()
        clear_device_cache(garbage_collection=True)
        return {}


def main() -> None:
    """Answer commands until the input ends. Whatever is printed goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for the developers of our dependencies
    rank = Rank()
    with torch._dynamo.config.patch(COMPILE_OPTIONS):
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = getattr(rank, command.pop("do"))(**command)
            except Exception as error:  # the caller turns it into the reason of a row
                out_of_memory = isinstance(error, torch.OutOfMemoryError)
                answer = {"error": f"{type(error).__name__}: {error}", "out_of_memory": out_of_memory}
            print(json.dumps(answer), file=replies, flush=True)
    rank.rest()
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
