"""Worker processes that end with their parent, and at once when it stops them.

Parent and workers share a pipe, to whose write end only the parent holds on. The operating system closes that end when
the parent ends, however it ends. A thread of each worker waits for this, and then ends the worker:

1. It interrupts the main thread, which removes its temporary files on the way out. Nothing is recorded.
2. A main thread that does not react, because it is in a long call of a library, is ended after some seconds.

On Linux the kernel also kills a worker whose parent has died, in case the worker's threads do not run.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")

MAX_STOP_SECONDS = 4.0  # until a worker that was asked to end is killed; users are promised five seconds
INTERRUPTED = 130  # exit code, as of a shell's command that Ctrl-C has ended
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies

# In a worker: whether the main thread makes a run, and the read end of the pipe.
_is_working = False
_reader: Connection | None = None


def follow_parent(parent_id: int, reader: Connection, writer: Connection) -> None:
    """Let this worker end when the parent ends or closes the pipe.

    Call it in the worker's main thread.

    Args:
        parent_id: Process id of the parent.
        reader: Read end of the pipe.
        writer: This process's copy of the write end, which is closed here.
    """
    global _reader
    _reader = reader
    writer.close()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the parent decides what stops
    _ask_kernel_to_kill_orphan(parent_id)
    threading.Thread(target=_end_with, args=(reader,), name="parent watch", daemon=True).start()


def work(make: Callable[[], Result]) -> Result:
    """Call a function in a worker; if the worker is told to end meanwhile, it ends here.

    The pool would report an exception to the parent and then begin the next run.
    """
    global _is_working
    if _reader and _reader.poll():  # the parent has stopped, and this thread was faster than the watching one
        os._exit(INTERRUPTED)
    _is_working = True
    try:
        return make()
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    finally:
        _is_working = False


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Block Ctrl-C in the `with` block, and for good in processes that are started there.

    A worker has no handler while it imports, and would print a traceback. Here Ctrl-C takes effect after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stopped_at_the_end(writer: Connection) -> Iterator[None]:
    """End the workers that are started in the `with` block, if an exception leaves it.

    Afterwards no worker lives. Those that do not end within `MAX_STOP_SECONDS` are killed.

    Args:
        writer: The parent's write end of the pipe.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        workers = [process for process in multiprocessing.active_children() if process not in before]
        writer.close()
        _end(workers)
        raise
    finally:
        writer.close()


def _end(workers: list[BaseProcess]) -> None:
    """Wait until the workers have ended; kill those that take too long, or all after another Ctrl-C."""
    if workers:
        print(f"stopping {len(workers)} worker processes.", file=sys.stderr, flush=True)
    deadline = time.monotonic() + MAX_STOP_SECONDS
    try:
        for process in workers:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in workers:
            if process.is_alive():
                process.kill()
            process.join()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM: leave the run, or end the process if there is none."""
    if not _is_working:
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def _end_with(reader: Connection) -> None:
    """Wait until the other end of the pipe is closed, then end this process."""
    with suppress(OSError, EOFError):
        reader.poll(None)  # nothing is ever sent, so it returns at the end only
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(MAX_STOP_SECONDS)
    os._exit(INTERRUPTED)


def _ask_kernel_to_kill_orphan(parent_id: int) -> None:
    """Ask Linux to kill this process when its parent dies; it may have died before."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_id:
        os._exit(INTERRUPTED)
