"""Files in a folder of results that no run needs any more."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.records.claims import LEASE_SECONDS, SUFFIX, read_claim
from bench.records.files import stale_files

FAILED = ".failed-"  # in the name of a failed run's record, before the time
ITEMS = ".items.csv.gz"
JOURNAL = ".answers"  # ends the name of the answers of a run that is scored, next to its checkpoint
# Its run's id; older and damaged checkpoints count too.
CHECKPOINT = re.compile(rf"(.+?)(?:(?:\.previous)?\.pt(?:\.damaged)?|{re.escape(JOURNAL)})")
# An items file is written just before its record. One that is younger may be about to get it.
MIN_SECONDS_WITHOUT_RECORD = 60.0
_FULL = {errno.ENOSPC, errno.EDQUOT}
# PyTorch and safetensors report a full disk without its number; torch.save does so in one of two ways.
_FULL_TEXT = re.compile(r"No space left on device|StreamWriter failed writing|inline_container.*unexpected pos \d+ vs")


class Leftover(NamedTuple):
    """A file that no run needs, and the reason."""

    path: Path
    reason: str


def find_leftovers(folder: Path) -> list[Leftover]:
    """Return the files that no run needs, in a folder of results and its `runs` and `checkpoints`."""
    runs, checkpoints = folder / "runs", folder / "checkpoints"
    found = [
        Leftover(path, "temporary file of a process that has ended")
        for place in (folder, runs, checkpoints)
        for path in stale_files(place)
    ]
    found += [
        Leftover(path, f"{'answers' if path.suffix == JOURNAL else 'checkpoint'} of a run that is recorded")
        for path in sorted(checkpoints.glob("[!.]*"))
        if (match := CHECKPOINT.fullmatch(path.name)) and (runs / f"{match[1]}.json").is_file()
    ]
    found += [
        Leftover(path, "failure of a run that is recorded")
        for path in sorted(runs.glob(f"[!.]*{FAILED}*"))
        if (runs / f"{path.name.partition(FAILED)[0]}.json").is_file()
    ]
    found += [
        Leftover(path, "claim of a process that has ended")
        for path in sorted(runs.glob(f"[!.]*{SUFFIX}"))
        if ((state := read_claim(path)) and state.is_dead_here())
        or ((runs / f"{path.name.removesuffix(SUFFIX)}.json").is_file() and _age(path) > LEASE_SECONDS)
    ]
    failures = {leftover.path for leftover in found}
    found += [
        Leftover(path, "items without a record")
        for path in sorted(runs.glob(f"[!.]*{ITEMS}"))
        if path not in failures
        and not (runs / f"{path.name.removesuffix(ITEMS)}.json").is_file()
        and _age(path) > MIN_SECONDS_WITHOUT_RECORD
    ]
    return found


def _age(path: Path) -> float:
    """Return the seconds since a file was modified."""
    return time.time() - path.stat().st_mtime


def remove_temporary_files(folder: Path) -> None:
    """Remove temporary files in a folder of results whose process has ended, or is this one."""
    for place in (folder, folder / "runs", folder / "checkpoints"):
        for path in stale_files(place):
            path.unlink(missing_ok=True)


@contextmanager
def temporary_files_removed(folder: Path) -> Iterator[None]:
    """Remove this process's temporary files in a folder of results after the `with` block, whatever ends it."""
    try:
        yield
    finally:
        remove_temporary_files(folder)


def remove_failures(run_id: str, folder: Path) -> None:
    """Remove the records of a run's failures, after it went well."""
    for path in (folder / "runs").glob(f"*{FAILED}*"):
        if path.name.partition(FAILED)[0] == run_id:
            path.unlink(missing_ok=True)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that a disk or a quota is full."""
    return getattr(error, "errno", None) in _FULL or bool(_FULL_TEXT.search(str(error)))
