"""Atomic writes of records and generated pages."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path


def _machine() -> str:
    """Return a name of this machine, or of this container, which counts its processes by itself.

    Folders may be shared, and a process id says nothing about another machine.
    """
    namespace = Path("/proc/self/ns/pid")  # on Linux
    name = platform.node() + (os.readlink(namespace) if namespace.is_symlink() else "")
    return hashlib.sha256(name.encode()).hexdigest()[:6]


MACHINE = _machine()
_TEMPORARY = re.compile(rf"\..+\.(?:{MACHINE}-)?(\d+)")  # former versions have the process id only


def temporary_path(path: Path) -> Path:
    """Return the name under which this process writes a file before it renames it, in the same folder.

    No other process has it, also of another machine that shares the folder. `stale_files` finds it.
    """
    return path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    A reader never sees half of a file, and an interrupted write leaves the old one as it was, also if the machine
    loses power. Text is UTF-8. If the write fails, the temporary file is removed. If the process is killed meanwhile,
    the file stays, and `stale_files` finds it.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def stale_files(folder: Path) -> list[Path]:
    """Return temporary files in a folder whose process has ended, or is this one.

    Call it only while this process writes no file there.
    """
    found = []
    for path in folder.glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and path.is_file() and (int(match[1]) == os.getpid() or not is_running(int(match[1]))):
            found.append(path)
    return sorted(found)


def is_running(process_id: int) -> bool:
    """Return whether this machine has a process of this id."""
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
