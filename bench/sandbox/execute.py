"""Run model-written Python programs with their tests, each in a sandbox.

Each program gets its own interpreter in a bubblewrap sandbox. The namespaces contain no network, no other processes,
no environment and no host files except the interpreter, its standard library and their shared libraries, all
read-only. The working folder is an empty tmpfs. Installed packages are missing, so results are the same everywhere.
The program cannot start processes: the limits on its one process are limits on the program, and nothing outlives it.

A program passes if the secret of its run appears in a memory that it shares with the harness. The runner writes it
there after the tests have ended. Tests are compiled before the program runs and have builtins of their own. So exiting
early, printing, reading or writing every descriptor, and replacing `check`, `exec`, `compile` or `abs` do not help, and
neither do the variables of frames, the garbage collector or a tracer. A right program may close all descriptors.

Known limits: program and tests share one interpreter. These wrong programs pass, as in every pass@1 harness:

- one whose values compare equal to everything, or that replaces a function of a module that the tests use, such as
  `math.isclose`
- one that looks at the frame of its tests when they call it, to read the expected answers or to set a tracer that jumps
  over an assertion
- one that searches the process's memory with `ctypes`, or makes a second `gc` module to find the runner's objects

The sandbox does not protect from faults in the host's kernel, and it does not hide timing. The number of files is
checked every POLL_SECONDS, so a program may exceed MAX_FILES for that long.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import re
import resource
import secrets
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from bench.errors import UserError
from bench.sandbox import bubblewrap, runner
from bench.sandbox.runner import FAILED, OUT_OF_MEMORY, READY, SECRET_BYTES

START_SECONDS = 60  # to start sandbox and interpreter on a busy machine; the program's own time limit begins later
POLL_SECONDS = 0.02  # other processes may keep the pipes of an ended process open, so its end is polled
MAX_SECONDS = 10.0
MAX_FOLDER_BYTES = 16 << 20  # for the working folder, and for a single file
MAX_FILES = 2048  # files and folders in the working folder; a file of no size takes a kilobyte of the kernel's memory
MAX_REPORT_BYTES = 4096
MAX_THREADS = 64  # the kernel does not apply this limit to root, whose threads are bounded by memory and time only
MAX_OPEN_FILES = 64
RUNNER = Path(runner.__file__).read_text(encoding="utf-8")


class Outcome(NamedTuple):
    """The result of a program.

    Attributes:
        reason: "passed", or the reason why it did not pass.
        detail: Printable text, in part written by the program. It proves nothing.
    """

    reason: Literal["passed", "failed", "timeout", "memory", "output"]
    detail: str = ""

    @property
    def passed(self) -> bool:
        """True if the tests ran to their end without an exception."""
        return self.reason == "passed"


def require_sandbox(unsafe: bool = False) -> None:
    """Check that programs can be run, before other work is done.

    Args:
        unsafe: Check for execution without a sandbox.

    Raises:
        UserError: Bubblewrap is missing or cannot make a sandbox on this machine.
    """
    run_program("", "", unsafe=unsafe)


def run_programs(
    programs: Iterable[tuple[str, str]], *, seconds: float = MAX_SECONDS, unsafe: bool = False
) -> list[Outcome]:
    """Run (program, tests) pairs in parallel on all cores of this process.

    The outcomes are returned in the order of the pairs.

    Args:
        programs: The programs, each with its tests.
        seconds: Time limit per program, see `run_program`.
        unsafe: Run without a sandbox, see `run_program`.

    Raises:
        UserError: Bubblewrap is missing or cannot make a sandbox on this machine.
    """
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=cores) as pool:
        return list(pool.map(lambda pair: run_program(*pair, seconds=seconds, unsafe=unsafe), programs))


def run_program(
    program: str,
    tests: str,
    *,
    seconds: float = MAX_SECONDS,
    memory_bytes: int = 1 << 30,
    output_bytes: int = 1 << 20,
    unsafe: bool = False,
) -> Outcome:
    """Run a program, then its tests in the same module.

    Both must end without an exception.

    Args:
        program: Python source.
        tests: Python source.
        seconds: Limit of wall-clock time, counted from when the interpreter is ready. The limit of CPU time, summed
            over all threads, is one second more.
        memory_bytes: Limit of the address space. The interpreter itself takes about 16 MB.
        output_bytes: Limit of the printed output.
        unsafe: Run without a sandbox, in a temporary folder and a process group of its own, with the same limits. The
            program can then do all that its user can: read, write, send, kill, and leave processes behind.

    Raises:
        UserError: Bubblewrap is missing or cannot make a sandbox on this machine.
    """
    secret = secrets.token_hex(SECRET_BYTES // 2)
    limits = _limits(seconds, memory_bytes)
    job = json.dumps({"program": program, "tests": tests, "limits": limits, "secret": secret}).encode()
    with contextlib.ExitStack() as stack:
        proof_file = os.memfd_create("proof")
        stack.callback(os.close, proof_file)
        os.truncate(proof_file, SECRET_BYTES)
        proof = stack.enter_context(mmap.mmap(proof_file, SECRET_BYTES, access=mmap.ACCESS_READ))
        report, report_end = os.pipe()
        stack.callback(os.close, report)
        with open(report_end, "wb"):  # closed here once the program has it, so that its end is noticed
            process, count_files = _start(report_end, proof_file, unsafe, stack)
        stack.callback(_stop, process)
        assert process.stdin is not None, "started with a pipe"
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(job)

        def has_passed() -> bool:
            return proof[:] == secret.encode()

        return _watch(process, report, has_passed, count_files, seconds, output_bytes)


def _limits(seconds: float, memory_bytes: int) -> list[tuple[int, tuple[int, int]]]:
    """Return the soft and hard resource limits of a program's process."""
    cpu_seconds = math.ceil(seconds) + 1
    return [
        (resource.RLIMIT_AS, (memory_bytes, memory_bytes)),
        (resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1)),  # SIGXCPU, then SIGKILL for programs that ignore it
        (resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS)),
        (resource.RLIMIT_FSIZE, (MAX_FOLDER_BYTES, MAX_FOLDER_BYTES)),
        (resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES)),
        (resource.RLIMIT_CORE, (0, 0)),
    ]


def _start(
    report_end: int, proof_file: int, unsafe: bool, stack: contextlib.ExitStack
) -> tuple[subprocess.Popen[bytes], Callable[[], int]]:
    """Start an interpreter that waits for a job.

    `stack` cleans up its folder and pipes.

    Returns:
        The process, and a function that counts the files in the program's folder.
    """
    inherited = [report_end, proof_file]
    wrapper: list[str] = []
    folder = "/"
    information: int | None = None
    if unsafe:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    else:
        inherited.append(_make_pipe_with(bubblewrap.one_process_filter(), stack))
        information, information_end = os.pipe()
        for end in (information, information_end):
            stack.callback(os.close, end)
        inherited.append(information_end)
        wrapper = [*bubblewrap.command(MAX_FOLDER_BYTES), "--seccomp", str(inherited[-2])]
        wrapper += ["--info-fd", str(information_end)]
    arguments = [*"-I -S -X utf8 -c".split(), RUNNER, str(report_end), str(proof_file)]
    process = subprocess.Popen(
        [*wrapper, bubblewrap.interpreter(), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=inherited,
        env={},
        cwd=folder,
        start_new_session=True,
    )
    return process, _FileCount(information) if information is not None else lambda: 0


class _FileCount:
    """Count the files in the working folder of a sandbox. Bubblewrap cannot limit them, and their size may be 0.

    Args:
        information: Pipe with what bubblewrap writes about the sandbox. It writes before the
            program starts.
    """

    def __init__(self, information: int) -> None:
        self.information = information
        self.folder: str | None = None

    def __call__(self) -> int:
        if self.folder is None:
            found = re.search(rb'"child-pid": *(\d+)', os.read(self.information, 4096))
            self.folder = os.path.join("/proc", str(int(found[1])), "root", "tmp") if found else ""
        try:
            system = os.statvfs(self.folder)
        except OSError:  # ended, or this user may not look into its namespaces
            return 0
        return system.f_files - system.f_ffree


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process group and close its output.

    Everything in a sandbox dies with bubblewrap. Without a sandbox this kills the processes of the same group.
    """
    assert process.stdout is not None, "started with a pipe"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def _watch(
    process: subprocess.Popen[bytes],
    report: int,
    has_passed: Callable[[], bool],
    count_files: Callable[[], int],
    seconds: float,
    output_bytes: int,
) -> Outcome:
    """Read a program's output and report until it passes, ends or exceeds a limit."""
    assert process.stdout is not None, "started with a pipe"
    output = process.stdout.fileno()
    received = {output: bytearray(), report: bytearray()}
    deadline, started = time.monotonic() + START_SECONDS, False
    with selectors.DefaultSelector() as selector:
        for descriptor in received:
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # polled before reading, so that the last output is not missed
            readable = selector.select(0 if ended else POLL_SECONDS)
            for key, _ in readable:
                received[key.fd] += (data := os.read(key.fd, 1 << 16))
                if not data:
                    selector.unregister(key.fd)
            if not started and received[report].startswith(READY):
                deadline, started = time.monotonic() + seconds, True
            if has_passed():
                return Outcome("passed")
            if started and count_files() > MAX_FILES:
                return Outcome("output", f"more than {MAX_FILES} files")
            if len(received[output]) > output_bytes or len(received[report]) > MAX_REPORT_BYTES:
                return Outcome("output", f"more than {output_bytes} bytes")
            if (ended and not readable) or time.monotonic() > deadline:
                break
    if not started:
        raise UserError(
            f"Bubblewrap cannot make a sandbox here ({_make_printable(received[output]) or 'it never started'}): let "
            f"this user make user namespaces, {bubblewrap.OR_UNSAFELY}."
        )
    if not ended:
        return Outcome("timeout", f"more than {seconds:g} seconds")
    return _explain_failure(process.returncode, received[report].removeprefix(READY), seconds)


def _explain_failure(status: int, report: bytearray, seconds: float) -> Outcome:
    """Return the outcome of a program that ended without proof of a pass."""
    if status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):  # bubblewrap reports its child's signals as a shell does
        return Outcome("timeout", f"more than {math.ceil(seconds) + 1} seconds of CPU")
    if report == OUT_OF_MEMORY:
        return Outcome("memory", "out of memory")
    if report.startswith(FAILED):
        return Outcome("failed", _make_printable(report.removeprefix(FAILED)))
    return Outcome("failed", f"ended with status {status} and no proof that its tests ran")


def _make_printable(content: bytes | bytearray) -> str:
    """Return at most 300 characters on one line, safe to print on a terminal.

    Characters that could control a terminal become spaces.
    """
    text = content.decode(errors="replace")[:300]
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _make_pipe_with(content: bytes, stack: contextlib.ExitStack) -> int:
    """Return the read end of a pipe with this content.

    The content must be smaller than a pipe's 64 KiB.
    """
    end, other = os.pipe()
    stack.callback(os.close, end)
    with open(other, "wb") as file:
        file.write(content)
    return end
