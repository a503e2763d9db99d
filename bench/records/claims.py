"""Claims: files by which sweeps agree on who makes a run.

Several sweeps may share a folder of results. A process claims a run before it makes it: it creates `runs/ID.claim`,
which fails if the file exists. It refreshes the claim's time of modification while it works, and removes the claim at
the end. A claim of a process that died is taken over:

1. At once, if that process was one of this machine.
2. Otherwise after nothing was refreshed for `LEASE_SECONDS`. The observer measures this on its own clock, so the clocks
   of machines need not agree.

A process that was only suspended finds that its claim is another's. It checks this immediately before it writes the
record (`Claim.require`), so a run is recorded by one process only.

`filelock.SoftFileLease` has the same rules, but takes a claim over by exchanging two names, which NFS refuses. Claims
are in the folder of the records for a reason: creating one makes an NFS client read that folder anew, so that it finds
a record that another machine has just written.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from bench.records.files import MACHINE, is_running, temporary_path

BEAT_SECONDS = 15.0
# A library that compiles may keep the interpreter, and with it the refreshing thread, for some time.
LEASE_SECONDS = 90.0
SUFFIX = ".claim"
_MISSING = {errno.ENOENT, errno.ESTALE}  # NFS says the latter of a file that another machine has removed


class ClaimLostError(Exception):
    """Another process has taken over the run, because this one did not refresh its claim in time."""


class ClaimState(NamedTuple):
    """What a claim's file says at one moment.

    Attributes:
        text: Contents of the file.
        refreshed: Time of modification in nanoseconds, by the clock of the storage.
    """

    text: str
    refreshed: int

    def is_dead_here(self) -> bool:
        """Return whether the owner was a process of this machine that has ended."""
        owner = self._owner()
        process = owner.get("process", "")
        return owner.get("machine") == MACHINE and process.isdecimal() and not is_running(int(process))

    def __str__(self) -> str:
        owner = self._owner()
        return f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown machine')}"

    def _owner(self) -> dict[str, str]:
        with suppress(ValueError):  # its process is about to write it, or was killed before
            owner = json.loads(self.text)
            if isinstance(owner, dict):
                return {name: str(value) for name, value in owner.items()}
        return {}


class Claim:
    """A claim that this process holds; `acquire` makes it. Use it in a `with` block.

    Args:
        path: The file.
        text: Its contents, which no other claim has.
        on_loss: Called in a thread when the claim is found to be lost.
    """

    def __init__(self, path: Path, text: str, on_loss: Callable[[], None] | None = None) -> None:
        self.path, self.text, self.on_loss = path, text, on_loss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh_until_stopped, name="claim", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):  # it expires
            if self.is_held():
                self.path.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Return whether the file is still this process's."""
        state = read_claim(self.path)
        return state is not None and state.text == self.text

    def require(self) -> None:
        """Check that the claim is held.

        Raises:
            ClaimLostError: It is not.
        """
        if not self.is_held():
            raise ClaimLostError(f"{self.path} is now that of {read_claim(self.path) or 'nobody'}")

    def _refresh_until_stopped(self) -> None:
        refreshed = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            is_lost = time.monotonic() - refreshed > LEASE_SECONDS  # also while the storage does not answer
            with suppress(OSError):
                if self.is_held():
                    os.utime(self.path)
                    refreshed, is_lost = time.monotonic(), False
                else:
                    is_lost = True
            if is_lost:
                if self.on_loss:
                    self.on_loss()
                return


class ClaimWatch:
    """Observes claims of others until they expire."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[ClaimState, float]] = {}

    def look(self, path: Path) -> tuple[ClaimState | None, bool]:
        """Look at a claim.

        Returns:
            Its state, or None if there is no claim; and whether its owner is dead: it was a process of this machine
            that has ended, or it has not refreshed the claim for `LEASE_SECONDS`.
        """
        asked = time.monotonic()
        state = read_claim(path)
        seen = self._seen.get(path)
        if state is None:
            self._seen.pop(path, None)
            return None, False
        if seen is None or seen[0] != state:
            self._seen[path] = seen = state, time.monotonic()
        return state, state.is_dead_here() or asked - seen[1] > LEASE_SECONDS


def claim_path(run_id: str, folder: Path) -> Path:
    """Return the file that claims a run, in a folder of results."""
    return folder / "runs" / f"{run_id}{SUFFIX}"


def claimed_runs(folder: Path) -> set[str]:
    """Return the ids of the runs that are claimed in a folder of results."""
    return {path.name.removesuffix(SUFFIX) for path in (folder / "runs").glob(f"[!.]*{SUFFIX}")}


def read_claim(path: Path) -> ClaimState | None:
    """Return the state of a claim, or None if there is none."""
    try:
        with path.open("rb") as file:  # opening makes an NFS client ask for the time of modification
            content, refreshed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise
    return ClaimState(content.decode("utf-8", "replace"), refreshed)


def acquire(path: Path, expired: ClaimState | None = None, on_loss: Callable[[], None] | None = None) -> Claim | None:
    """Claim a run, or return None if another process has it.

    Args:
        path: The claim's file, of `claim_path`.
        expired: A claim whose owner is dead, by `ClaimWatch`. It is taken over if it is unchanged.
        on_loss: See `Claim`.
    """
    state = read_claim(path)
    if state and (state == expired or state.is_dead_here()) and not _remove(path, state):
        return None
    owner = {
        "host": socket.gethostname(),
        "machine": MACHINE,
        "process": str(os.getpid()),
        "claim": secrets.token_hex(8),
    }
    text = json.dumps(owner)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return None
    return Claim(path, text, on_loss)


def _remove(path: Path, state: ClaimState) -> bool:
    """Remove a claim if it is in this state; return whether it was.

    Several processes may try this at once, and the first one may have claimed the run anew meanwhile. Renaming is
    atomic, so only one process gets the file. If it turns out to be a new claim, it goes back to its place. If that has
    been taken in between, its owner finds that out, as after an expiry.
    """
    aside = temporary_path(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
    try:
        os.rename(path, aside)
    except OSError as error:
        if error.errno in _MISSING:
            return False
        raise
    found = read_claim(aside)
    if found == state:
        aside.unlink(missing_ok=True)
        return True
    with suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink(missing_ok=True)
    return False
