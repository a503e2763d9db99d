"""Make a run whose record and checkpoints are in a `RemoteFolder`.

1. Pull the record and the checkpoints of the run into a temporary folder of this machine.
2. Make the run there. A thread pushes the checkpoints and the journal of answers whenever they have changed.
3. Push the items, then the record, and then remove the checkpoints from the remote folder.

If the machine dies, another one begins with the checkpoints that were pushed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from bench.records import store
from bench.records.claims import Claim, ClaimLostError
from bench.records.files import MACHINE, is_running
from bench.records.remote import RemoteFolder
from bench.records.schema import Record, RunConfig
from bench.runs.run import run, unfinished_files
from bench.runs.setting import RunSettings

PUSH_SECONDS = 5.0
_FOLDER = re.compile(r"malora-run-[0-9a-f]+-(\d+)-.*")


def run_remotely(config: RunConfig, setting: RunSettings, jobs: int, claim: Claim, remote: RemoteFolder) -> Record:
    """Make a run and return its record, or return the record that the remote folder has.

    Args:
        config: Configuration of the run.
        setting: Its settings, but for the folder of results.
        jobs: Number of runs at the same time, on this machine.
        claim: The claim on the run, in the remote folder.
        remote: The folder.

    Raises:
        ClaimLostError: Another process has the claim, or has written the record.
        OSError: The storage fails. The run can be made again, from its last checkpoint.
        Exception: As `bench.runs.run.run`.
    """
    with local_folder() as folder:
        setting = replace(setting, results=folder)
        store.open_folder(folder)
        remote.pull_record(f"runs/{config.id}.json", folder)
        was_recorded = (folder / "runs" / f"{config.id}.json").is_file()
        files = unfinished_files(config, setting)
        if not was_recorded:
            remote.pull([str(path.relative_to(folder)) for path in files], folder)
        try:
            with Pusher(files, folder, remote):
                record = run(config, setting, jobs, claim=claim)
        except torch.OutOfMemoryError:
            _remove_missing(files, folder, remote)  # nothing may resume from them
            raise
        if not was_recorded:
            claim.require()
            assert record.path is not None, "it was written"
            if not remote.push_record(record.path):
                raise ClaimLostError(f"{config.id} was recorded by another process")
        _remove_missing(files, folder, remote)
        if record.status != "failed":
            remote.remove_failures(config.id)
    return record


def _remove_missing(files: Sequence[Path], folder: Path, remote: RemoteFolder) -> None:
    """Remove files from the remote folder which the run has removed from the local one."""
    remote.remove(*(str(path.relative_to(folder)) for path in files if not path.exists()))


@contextmanager
def local_folder() -> Iterator[Path]:
    """Make a temporary folder for a run, and remove those of processes of this machine that were killed."""
    for other in Path(tempfile.gettempdir()).glob(f"malora-run-{MACHINE}-*"):
        match = _FOLDER.fullmatch(other.name)
        if match and not is_running(int(match[1])):
            shutil.rmtree(other, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"malora-run-{MACHINE}-{os.getpid()}-") as name:
        yield Path(name)


class Pusher:
    """Pushes files from a thread whenever they have changed, during a `with` block.

    Args:
        files: The files, which are only replaced as a whole or appended to. Those that exist were pulled.
        folder: Local folder of results that they are in.
        remote: The remote folder.
    """

    def __init__(self, files: Sequence[Path], folder: Path, remote: RemoteFolder) -> None:
        self.files, self.folder, self.remote = files, folder, remote
        self._known = {path: _version(path) for path in files}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._push_until_stopped, name="push", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _push_until_stopped(self) -> None:
        while not self._stop.wait(PUSH_SECONDS):
            try:
                self._push_changed()
            except OSError as error:  # it may be there again at the next try
                print(f"checkpoints cannot be pushed ({error})", file=sys.stderr, flush=True)

    def _push_changed(self) -> None:
        """Push the files that have changed since they were last pushed."""
        for path in self.files:
            version = _version(path)
            if version is None or version == self._known[path]:
                continue
            try:
                content = path.read_bytes()  # the whole file: a new one is renamed to this name
            except FileNotFoundError:
                continue  # the run has ended
            self.remote.write(str(path.relative_to(self.folder)), content)
            self._known[path] = version


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with each new version of a file; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
