"""Runs Python programs that a language model wrote, and says of each whether its tests passed.

Each program gets an interpreter of its own in a bubblewrap sandbox: namespaces without a network, other processes or
host files but the interpreter, its standard library and the shared libraries they load, all read-only; an empty tmpfs
as working folder; no environment. It may not make processes, so the limits on its one process are those of the program,
and there is nothing that could outlive it. Installed packages are not there: what passes does so on any machine.

What proves a pass: a secret of this run lies in a pipe, and the runner fetches it and reports it only after the tests
ran to their end. Exiting early, printing, writing to every descriptor or replacing `check` prove nothing. What does,
for program and tests share one interpreter: a program written against this very file, which finds the pipe and forges
the report, and one whose values compare equal to everything. No pass@1 in the field is safe from those. Nor does a
sandbox on the host's kernel protect from a fault in that kernel, or hide how long things take.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import secrets
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from bench.errors import UserError
from bench.sandbox import bubblewrap, runner
from bench.sandbox.runner import FAILED, OUT_OF_MEMORY, READY, SECRET_BYTES

START_SECONDS = 60  # for the sandbox and the interpreter, on however loaded a machine; the program's own clock is later
POLL_SECONDS = 0.02  # a process may end with its pipes held open elsewhere, so its end is asked for
FOLDER_BYTES = 16 << 20  # the working folder, and a file in it
REPORT_BYTES = 4096
TASKS = 64  # threads; the kernel does not hold root to it, whose threads are bounded by memory and time
OPEN_FILES = 64
RUNNER = Path(runner.__file__).read_text()


class Outcome(NamedTuple):
    """Why a program passed or did not; `detail` is the program's own words, as printable text, and proves nothing."""

    reason: Literal["passed", "failed", "timeout", "memory", "output"]
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


def require_sandbox(unsafe: bool = False) -> None:
    """Make sure, before any work is spent, that programs can be run; `unsafe` asks for no sandbox.

    Raises:
        UserError: bubblewrap is missing or cannot make a sandbox on this machine.
    """
    run_program("", "", unsafe=unsafe)


def run_programs(programs: Iterable[tuple[str, str]], **options) -> list[Outcome]:
    """`run_program` for each (program, tests), as many at once as this process has cores; outcomes in their order."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=cores) as pool:
        return list(pool.map(lambda pair: run_program(*pair, **options), programs))


def run_program(
    program: str,
    tests: str,
    *,
    seconds: float = 10,
    memory_bytes: int = 1 << 30,
    output_bytes: int = 1 << 20,
    unsafe: bool = False,
) -> Outcome:
    """Run a program, then its tests in the same module; it passes if both end without an exception.

    Args:
        seconds: wall-clock time from when the interpreter is up; CPU time of all threads is a second more.
        memory_bytes: address space, interpreter included. An idle one takes some 16 MB.
        output_bytes: what it may print before it is killed.
        unsafe: no sandbox, only a folder and a process group of its own and the same limits: it can read, write, send
            and kill whatever its user can, and leave processes behind.

    Raises:
        UserError: bubblewrap is missing or cannot make a sandbox on this machine.
    """
    cpu_seconds = math.ceil(seconds) + 1
    limits = [
        (resource.RLIMIT_AS, (memory_bytes, memory_bytes)),
        (resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1)),  # SIGXCPU, and SIGKILL for who ignores it
        (resource.RLIMIT_NPROC, (TASKS, TASKS)),
        (resource.RLIMIT_FSIZE, (FOLDER_BYTES, FOLDER_BYTES)),
        (resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES)),
        (resource.RLIMIT_CORE, (0, 0)),
    ]
    job = json.dumps({"program": program, "tests": tests, "limits": limits}).encode()
    secret = secrets.token_hex(SECRET_BYTES // 2).encode()
    with contextlib.ExitStack() as stack:
        secret_end = _pipe_holding(secret, stack)
        report, report_end = os.pipe()
        stack.callback(os.close, report)
        with open(report_end, "wb"):  # closed here once the program has it, so that its end is seen
            inherited, wrapper, folder = [report_end, secret_end], [], "/"
            if unsafe:
                folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            else:
                inherited.append(_pipe_holding(bubblewrap.one_process_filter(), stack))
                wrapper = [*bubblewrap.command(FOLDER_BYTES), "--seccomp", str(inherited[-1])]
            runner = [*"-I -S -X utf8 -c".split(), RUNNER, str(report_end), str(secret_end)]
            process = subprocess.Popen(
                [*wrapper, bubblewrap.interpreter(), *runner],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                env={},
                cwd=folder,
                start_new_session=True,
            )
        stack.callback(_stop, process)
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(job)
        return _watch(process, report, READY + secret, seconds, output_bytes)


def _stop(process: subprocess.Popen) -> None:
    """Bubblewrap's death is that of all in its sandbox; without one, this reaches who stayed in the process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def _watch(process: subprocess.Popen, report: int, proof: bytes, seconds: float, output_bytes: int) -> Outcome:
    """Read what the program prints and reports until it has ended, proved its pass or gone over a limit."""
    output = process.stdout.fileno()
    said = {output: bytearray(), report: bytearray()}
    deadline, started = time.monotonic() + START_SECONDS, False
    with selectors.DefaultSelector() as selector:
        for descriptor in said:
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # asked before reading, so that nothing it said is missed
            readable = selector.select(0 if ended else POLL_SECONDS)
            for key, _ in readable:
                said[key.fd] += (data := os.read(key.fd, 1 << 16))
                if not data:
                    selector.unregister(key.fd)
            if not started and said[report].startswith(READY):
                deadline, started = time.monotonic() + seconds, True
            if said[report] == proof:
                return Outcome("passed")
            if len(said[output]) > output_bytes or len(said[report]) > REPORT_BYTES:
                return Outcome("output", f"more than {output_bytes} bytes")
            if (ended and not readable) or time.monotonic() > deadline:
                break
    if not started:
        raise UserError(
            f"Bubblewrap cannot make a sandbox here ({_printable(said[output]) or 'it never started'}): let this user "
            f"make user namespaces, {bubblewrap.OR_UNSAFELY}."
        )
    if not ended:
        return Outcome("timeout", f"more than {seconds:g} seconds")
    status = process.returncode
    if status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):  # bubblewrap reports its child's signals as a shell does
        return Outcome("timeout", f"more than {math.ceil(seconds) + 1} seconds of CPU")
    words = said[report].removeprefix(READY)
    if words == OUT_OF_MEMORY:
        return Outcome("memory", "out of memory")
    if words.startswith(FAILED):
        return Outcome("failed", _printable(words.removeprefix(FAILED)))
    return Outcome("failed", f"ended with status {status} and no proof that its tests ran")


def _printable(text: bytes) -> str:
    """At most 300 characters on one line, none of which a terminal could take for a command."""
    text = text.decode(errors="replace")[:300]
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _pipe_holding(content: bytes, stack: contextlib.ExitStack) -> int:
    """The end to read of a pipe with this content, which must be smaller than a pipe's 64 KiB."""
    end, other = os.pipe()
    stack.callback(os.close, end)
    with open(other, "wb") as file:
        file.write(content)
    return end
