"""Start the processes of distributed rows, and let these rows take turns with the others."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.errors import UserError
from bench.records.provenance import ROOT
from bench.speed.loops.rounds import Program
from bench.speed.loops.rows import LoopRow
from bench.speed.loops.worker_process import WorkerProcess
from bench.speed.steps import Workload

COMMAND = (sys.executable, "-m", "bench.speed.loops.distributed.rank")


def check_world(world: int, device: torch.device) -> None:
    """Check that there is a GPU for each process. Without any GPU, the processes share the CPU.

    Raises:
        UserError: There are fewer.
    """
    if device.type != "cuda" or (found := torch.cuda.device_count()) >= world:
        return
    there_are = "is 1 GPU" if found == 1 else f"are {found} GPUs"
    raise UserError(
        f"--world {world} needs {world} GPUs, and there {there_are} here (CUDA_VISIBLE_DEVICES counts); "
        "choose a smaller number, or leave it out."
    )


class Ranks:
    """The processes of a call, one per GPU. They are started when they are first needed, and serve all rows.

    Use it as a context manager, which ends them. A process that fails would leave the others waiting for it, so all of
    them are ended, and started anew for the next row.
    """

    def __init__(self, world: int, shape: str, layers: int | None, work: Workload, device: torch.device) -> None:
        self.world, self.shape, self.layers, self.work, self.device = world, shape, layers, work, device
        self.workers: list[WorkerProcess] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Send a command to all processes and return their answers, in the order of ranks.

        Raises:
            torch.OutOfMemoryError: A process ran out of GPU memory.
            RuntimeError: One failed otherwise, or ended.
        """
        return self._ask(do, [arguments] * self.world)

    def start(self) -> None:
        """Start and connect the processes, if they do not run."""
        if self.workers:
            return
        # torchrun sets the number of threads likewise.
        variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.workers = [WorkerProcess(COMMAND, ROOT, variables) for _ in range(self.world)]
        with tempfile.TemporaryDirectory(prefix="malora-ranks-") as folder:
            shared = {"world": self.world, "store": str(Path(folder) / "store"), "device": self.device.type}
            self._ask("join", [{"rank": rank, **shared} for rank in range(self.world)])

    def close(self) -> None:
        """End the processes."""
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.stop()  # first all of them, because they end together
        for worker in workers:
            worker.close()

    def _ask(self, do: str, arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.world) as pool:
            answers = [pool.submit(worker.ask, do, **own) for worker, own in zip(self.workers, arguments, strict=True)]
            try:
                done, _ = wait(answers, return_when=FIRST_EXCEPTION)
                failed = next((answer for answer in done if answer.exception()), None)
            except BaseException:
                self._kill()
                raise
            if failed is not None:
                self._kill()  # the others would wait for it
        if failed is not None:
            self.close()
        return [answer.result() for answer in ([failed] if failed else answers)]

    def _kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()


class DistributedProgram:
    """A program of all processes. See `bench.speed.loops.rounds.Program`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.last_loss = 0.0

    def step(self) -> float:
        """Run an optimizer step and return the seconds of the slowest process."""
        answers = self.ranks.ask("step")
        self.last_loss = answers[0]["loss"]
        for message in answers[0]["warnings"]:  # the other processes have the same ones
            logging.getLogger("malora").warning("%s", message)
        return float(max(answer["seconds"] for answer in answers))

    def warm(self, seconds: float) -> None:  # noqa: D102
        self.ranks.ask("warm", seconds=seconds)

    def loss(self) -> float:
        """Return the first process's loss of the last step."""
        return self.last_loss

    def peak_bytes(self) -> dict[str, int] | None:
        """Return the largest peak of a process."""
        peaks = [answer["peak"] for answer in self.ranks.ask("peak")]
        return None if peaks[0] is None else {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]}

    def counts(self) -> dict[str, Any]:  # noqa: D102
        return {"kernels": None}  # not counted in other processes


class DistributedRow:
    """A row that all processes train. See `bench.speed.loops.rounds.Row`."""

    def __init__(self, row: LoopRow, ranks: Ranks) -> None:
        self.row, self.ranks = row, ranks
        self.about = row.about | {"world": ranks.world}

    @contextmanager
    def opened(self) -> Iterator[Program]:  # noqa: D102
        ranks = self.ranks
        ranks.start()
        try:
            ranks.ask(
                "prepare",
                row=self.row.name, shape=ranks.shape, layers=ranks.layers, work=dataclasses.asdict(ranks.work),
            )  # fmt: skip
            yield DistributedProgram(ranks)
            ranks.ask("rest")
        except BaseException:
            ranks.close()
            raise
