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

`Claim`, `ClaimWatch` and `acquire` work on a `ClaimPlace`. A path stands for `ClaimFile`, a file as above.
`bench.records.remote` has claims on object storage.
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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

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
        text: Names the owner; no other claim has the same text.
        refreshed: Changes with each refresh. Of a file it is the time of modification in nanoseconds, by the clock of
            the storage.
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


class ClaimPlace(Protocol):
    """Place of the claim on one run, with the operations of the storage. All of them raise OSError if it fails."""

    def read(self) -> ClaimState | None:
        """Return the state of the claim, or None if there is none."""

    def create(self, text: str, instead_of: ClaimState | None) -> bool:
        """Make a new claim, and return whether this process has it.

        Args:
            text: Text of the new claim.
            instead_of: The claim of a dead owner, which the new one replaces if it is still in this state. None if
                there must be no claim.
        """

    def refresh(self, text: str) -> None:
        """Change `refreshed` of the claim with this text, which is this process's."""

    def remove(self, text: str) -> None:
        """Remove the claim with this text, which is this process's."""


class Claim:
    """A claim that this process holds; `acquire` makes it. Use it in a `with` block.

    Args:
        path: The place, or the file.
        text: Text of the claim.
        on_loss: Called in a thread when the claim is found to be lost.
    """

    def __init__(self, path: Path | ClaimPlace, text: str, on_loss: Callable[[], None] | None = None) -> None:
        self.place, self.text, self.on_loss = _place(path), text, on_loss
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
                self.place.remove(self.text)

    def is_held(self) -> bool:
        """Return whether the claim is still this process's."""
        state = self.place.read()
        return state is not None and state.text == self.text

    def require(self) -> None:
        """Check that the claim is held.

        Raises:
            ClaimLostError: It is not.
        """
        if not self.is_held():
            raise ClaimLostError(f"{self.place} is now that of {self.place.read() or 'nobody'}")

    def _refresh_until_stopped(self) -> None:
        refreshed = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            is_lost = time.monotonic() - refreshed > LEASE_SECONDS  # also while the storage does not answer
            with suppress(OSError):
                if self.is_held():
                    self.place.refresh(self.text)
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
        self._seen: dict[Path | ClaimPlace, tuple[ClaimState, float]] = {}

    def look(self, path: Path | ClaimPlace) -> tuple[ClaimState | None, bool]:
        """Look at a claim.

        Returns:
            Its state, or None if there is no claim; and whether its owner is dead: it was a process of this machine
            that has ended, or it has not refreshed the claim for `LEASE_SECONDS`.
        """
        asked = time.monotonic()
        state = _place(path).read()
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


@dataclass(frozen=True)
class ClaimFile:
    """The claim on a run as a file of a folder that all machines mount.

    Attributes:
        path: The file.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> ClaimState | None:
        """Return the state of the claim, or None if there is none."""
        return read_claim(self.path)

    def create(self, text: str, instead_of: ClaimState | None) -> bool:
        """Make a new claim, and return whether this process has it; see `ClaimPlace`."""
        if instead_of and not _remove(self.path, instead_of):
            return False
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def refresh(self, text: str) -> None:
        """Set the time of modification, which leaves a claim of somebody else what it is."""
        os.utime(self.path)

    def remove(self, text: str) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _place(path: Path | ClaimPlace) -> ClaimPlace:
    return ClaimFile(path) if isinstance(path, Path) else path


def acquire(
    path: Path | ClaimPlace, expired: ClaimState | None = None, on_loss: Callable[[], None] | None = None
) -> Claim | None:
    """Claim a run, or return None if another process has it.

    Args:
        path: The claim's place, or its file, of `claim_path`.
        expired: A claim whose owner is dead, by `ClaimWatch`. It is taken over if it is unchanged.
        on_loss: See `Claim`.
    """
    place = _place(path)
    state = place.read()
    is_dead = bool(state and (state == expired or state.is_dead_here()))
    owner = {
        "host": socket.gethostname(),
        "machine": MACHINE,
        "process": str(os.getpid()),
        "claim": secrets.token_hex(8),
    }
    text = json.dumps(owner)
    return Claim(place, text, on_loss) if place.create(text, state if is_dead else None) else None


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
