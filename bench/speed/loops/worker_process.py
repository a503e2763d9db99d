"""A worker process that answers commands: a JSON object per line on its standard input and output.

A command is {"do": name, ...}. An answer is an object. That of a command that failed is {"error": ...,
"out_of_memory": ...}.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

MAX_LOG = 2000  # characters of a worker's output that are searched for a reason
STOP_SECONDS = 30.0


class WorkerProcess:
    """A process that answers commands.

    Args:
        command: The program and its arguments.
        folder: Its working directory.
        environment: Variables to set, besides those of this process.
    """

    def __init__(self, command: Sequence[str], folder: Path | str, environment: Mapping[str, str]) -> None:
        self.log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # in close
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=folder,
            env={**os.environ, **environment},
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer.

        Raises:
            torch.OutOfMemoryError: The worker ran out of GPU memory.
            RuntimeError: It failed otherwise, or ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None, "they are pipes"
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker ended: {self._last_line()}")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("out_of_memory"):
            raise torch.OutOfMemoryError(answer["error"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def stop(self) -> None:
        """Tell the process to end, and do not wait for it."""
        assert self.process.stdin is not None, "it is a pipe"
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            self.process.kill()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdout is not None, "it is a pipe"
        self.stop()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _last_line(self) -> str:
        self.log.seek(0)
        lines = self.log.read()[-MAX_LOG:].strip().splitlines()
        return lines[-1] if lines else f"exit status {self.process.wait(STOP_SECONDS)}"
