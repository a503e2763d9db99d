"""Start worker processes and let them take turns with the other rows."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.errors import UserError
from bench.models.backbone import Shape, save_backbone
from bench.records.provenance import ROOT
from bench.speed.loops.rounds import Program
from bench.speed.loops.rows import LoopRow
from bench.speed.loops.worker_process import WorkerProcess
from bench.speed.profiler import warm_device
from bench.speed.steps import Workload

WORKER = Path(__file__).parent / "unsloth_worker.py"
FOLDER_VARIABLE = "MALORA_BASELINES"  # names the folder of the environment
DEFAULT_FOLDER = ROOT / ".baselines"  # where `make baselines` installs
# A worker keeps its model between its turns only if this share of the GPU's memory is left for the other rows.
MIN_FREE_SHARE = 0.6
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def external_folder(given: Path | None) -> Path | None:
    """Return the folder of the workers' environment, or None if nothing is installed.

    Args:
        given: The folder that the user named; else `FOLDER_VARIABLE` or `DEFAULT_FOLDER` does.

    Raises:
        UserError: The user named a folder without the package.
    """
    named = given or (Path(os.environ[FOLDER_VARIABLE]) if os.environ.get(FOLDER_VARIABLE) else None)
    folder = named or DEFAULT_FOLDER
    if (folder / "unsloth").is_dir():
        return folder
    if named is not None:
        raise UserError(f"--baselines {named} has no package unsloth; `make baselines` installs it into .baselines.")
    return None


class ExternalBaselines:
    """What the workers of a call share: their environment, and a folder with the base model.

    Use it as a context manager, which ends the workers.
    """

    def __init__(self, folder: Path, shape: Shape, layers: int | None, work: Workload, device: torch.device) -> None:
        self.folder, self.shape, self.layers, self.work, self.device = folder, shape, layers, work, device
        self.stack = ExitStack()
        self._model: Path | None = None

    def __enter__(self) -> ExternalBaselines:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def model_folder(self) -> str:
        """Return a folder with the random backbone and a tokenizer. It is written when it is first needed."""
        if self._model is None:
            folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="malora-speed-")))
            save_backbone(self.shape, self.layers, self.device, self.work.length, folder)
            self._model = folder
        return str(self._model)


class Worker(WorkerProcess):
    """A process of Unsloth. It is a `bench.speed.loops.rounds.Program`."""

    def __init__(self, folder: Path, cache: str, device: torch.device) -> None:
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = SETTINGS | {"PYTHONPATH": os.pathsep.join(paths), "UNSLOTH_COMPILE_LOCATION": cache}
        super().__init__([sys.executable, str(WORKER)], cache, variables)
        self.device = device
        self.last_loss = 0.0

    def step(self) -> float:  # noqa: D102
        answer = self.ask("step")
        self.last_loss = answer["loss"]
        return float(answer["seconds"])

    def warm(self, seconds: float) -> None:  # noqa: D102
        warm_device(self.device, seconds)

    def loss(self) -> float:  # noqa: D102
        return self.last_loss

    def peak_bytes(self) -> dict[str, int] | None:  # noqa: D102
        peak = self.ask("peak")
        return None if peak["allocated"] is None else peak

    def counts(self) -> dict[str, Any]:  # noqa: D102
        return {"kernels": None}  # not counted in another process


class ExternalRow:
    """A row whose program runs in a worker. See `bench.speed.loops.rounds.Row`."""

    def __init__(self, row: LoopRow, external: ExternalBaselines) -> None:
        self.row, self.external = row, external
        self.about = row.about
        self.worker: Worker | None = None

    @contextmanager
    def opened(self) -> Iterator[Program]:
        """Start the worker, or wake the one of the round before. End it if others need its memory, or if it fails."""
        if self.worker is None:
            folder = self.external.model_folder()
            cache = self.external.stack.enter_context(tempfile.TemporaryDirectory(prefix="malora-baseline-"))
            self.worker = Worker(self.external.folder, cache, self.external.device)
            self.external.stack.callback(self._close)
            self.about |= self._prepare(self.worker, folder)
        try:
            yield self.worker
            self.worker.ask("rest")
        except BaseException:
            self._close()
            raise
        if self._is_crowded():
            self._close()

    def _prepare(self, worker: Worker, folder: str) -> dict[str, Any]:
        work, row = self.external.work, self.row
        ids = work.ids(work.batch, torch.device("cpu")).tolist()
        dropout = work.dropout if row.dropout is None else row.dropout
        saves, in_4_bits = row.checkpointing != "none", row.base == "nf4"
        try:
            return worker.ask(
                "prepare", folder=folder, ids=ids, dropout=dropout, checkpointing=saves, in_4_bits=in_4_bits
            )
        except BaseException:
            self._close()
            raise

    def _is_crowded(self) -> bool:
        if self.external.device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self.external.device)
        return free < MIN_FREE_SHARE * total

    def _close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None
