"""Start Python programs in tests without importing PyTorch again.

Importing torch, transformers, PEFT and lm-eval takes a new process 6 to 10 seconds of CPU time. So a session forks a
process after its tests are imported and before the first one runs. This process, the template, only waits. `run` forks
it again for each program. The program starts with everything imported, but with nothing that a test has changed.

A process that was forked cannot use CUDA. With a GPU, programs start as a user starts them, and `as_a_user` asks for
that everywhere.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

ROOT = Path(__file__).resolve().parents[1]
_FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


@dataclass(frozen=True)
class Program:
    """A Python program, its arguments and its surroundings."""

    name: str | Path  # of a module, or a script's path
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    folder: Path
    absent: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The words after `python`."""
        return [*([str(self.name)] if isinstance(self.name, Path) else ["-m", self.name]), *self.arguments]


def run(
    name: str | Path,
    *arguments: object,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    absent: Sequence[str] = (),
    count: int = 1,
    as_a_user: bool = False,
    timeout: float = 280,
) -> subprocess.CompletedProcess[str]:
    """Run a program as `python -m name arguments`, and return it with its output.

    Args:
        name: Name of a module, or the path of a script.
        arguments: Its arguments, which become strings.
        folder: The working directory.
        environment: Variables to set, besides those of this process.
        absent: Packages of this repository that the program must not be able to import.
        count: Number of processes. Several are connected as torchrun connects them.
        as_a_user: Start a new Python, or torchrun. Otherwise fork the template if there is one.
        timeout: Seconds until the processes are killed, which raises `subprocess.TimeoutExpired`.

    Returns:
        The output of all processes. If one fails, the others are killed, and the return code is not 0.
    """
    path = "" if absent else os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(environment or {})}
    program = Program(name, tuple(map(str, arguments)), variables, folder, tuple(absent))
    if as_a_user or not template:
        return _run_as_a_user(program, count, timeout)
    return template.run(program, count, timeout)


def _run_as_a_user(program: Program, count: int, timeout: float) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *program.words],
        capture_output=True,
        text=True,
        cwd=program.folder,
        env=program.environment,
        timeout=timeout,
    )


class Template:
    """A process that forks itself for each program."""

    def __init__(self) -> None:
        self._process: ForkProcess | None = None
        self._connection: Connection

    def __bool__(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Fork this process. Nothing happens where that is impossible, or with a GPU."""
        if _FORK is None or torch.cuda.is_available():
            return
        self._connection, other = _FORK.Pipe()
        self._process = _FORK.Process(target=_serve, args=(other, self._connection), name="template")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has threads, which do nothing now
            self._process.start()
        other.close()

    def stop(self) -> None:
        """End the process, and wait for it."""
        if self._process:
            self._connection.close()
            self._process.join()
            self._process = None

    def run(self, program: Program, count: int, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a program in `count` processes."""
        with tempfile.TemporaryDirectory() as folder:
            files = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(count)]
            store = _make_store() if count > 1 else None
            programs = [
                program
                if store is None
                else replace(program, environment=program.environment | _torchrun_variables(rank, count, store.port))
                for rank in range(count)
            ]
            self._connection.send((programs, files, timeout))
            code = self._connection.recv()
            out, err = ("".join(pair[i].read_text() for pair in files if pair[i].exists()) for i in range(2))
        if code is None:
            raise subprocess.TimeoutExpired(program.words, timeout, out, err)
        return subprocess.CompletedProcess(program.words, code, out, err)


template = Template()


def _make_store() -> Any:
    """Make the store through which processes find each other, on a free port. Torchrun has it in the launcher too."""
    return distributed.TCPStore(  # type: ignore[attr-defined]
        "localhost", 0, is_master=True, wait_for_workers=False
    )


def _torchrun_variables(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables by which torchrun tells a process of the others."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {
        "MASTER_ADDR": "localhost",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **{name: str(number) for name, number in numbers.items()},
    }


def _serve(connection: Connection, other: Connection) -> None:
    """Run programs until the session closes its end of the connection."""
    other.close()
    assert _FORK is not None
    while True:
        try:
            programs, files, timeout = connection.recv()
        except EOFError:
            return
        processes = [_FORK.Process(target=_run, args=(program, *pair)) for program, pair in zip(programs, files)]
        for process in processes:
            process.start()
        connection.send(_wait_for(processes, time.monotonic() + timeout))


def _wait_for(processes: list[ForkProcess], deadline: float) -> int | None:
    """Wait until all processes have ended, or one has failed; return its code, or None after the deadline."""

    def failure() -> int:
        return next((process.exitcode for process in processes if process.exitcode), 0)

    is_late = False
    while not is_late and not failure() and (running := [one for one in processes if one.exitcode is None]):
        ended = wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
        is_late = not ended
        for process in running:
            if process.sentinel in ended:
                process.join()  # its code is known only now
    code = None if is_late else failure()
    for process in processes:
        process.kill()
        process.join()
    return code


def _run(program: Program, out: Path, err: Path) -> None:
    """Become a program."""
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(program.environment)
    os.chdir(program.folder)
    sys.argv = [str(program.name), *program.arguments]
    for name in [module for module in sys.modules if module.partition(".")[0] in program.absent]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(program.absent))  # type: ignore[arg-type]  # None: Python finds no such module
    if isinstance(program.name, Path):
        sys.path.insert(0, str(program.name.parent))
        runpy.run_path(str(program.name), run_name="__main__")
    else:
        runpy.run_module(program.name, run_name="__main__", alter_sys=True)
