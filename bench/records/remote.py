"""A folder of results behind a URL, such as `s3://bucket/results`, which all machines of a cluster reach.

It has the files of a local folder of results under the same names, and these operations of fsspec:

1. A file is replaced as a whole. Object storage does so by itself. For `file://` it is renamed.
2. A file is created exclusively: of several processes one succeeds. Claims and records need this.

Object storage has neither a time of modification that can be set nor an atomic change of names, and a late write
replaces whatever is there. So a claim is not one file, but `claims/ID.N` with the numbers N = 1, 2, ...:

- The claim with the highest number holds. A dead owner's claim N is taken over by the exclusive creation of N + 1.
- Only its owner writes to a claim. It refreshes it by a new number in the second line, so a late write of an owner that
  was suspended changes a claim that no longer holds.
- An owner that ends removes the lower numbers first, and then its own.
"""

from __future__ import annotations

import inspect
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from bench.errors import UserError
from bench.records.claims import ClaimPlace, ClaimState, claim_path
from bench.records.files import temporary_path, write_atomically
from bench.records.leftovers import CHECKPOINT, FAILED, ITEMS, remove_temporary_files

# Storage whose driver creates a file exclusively, with the package of the driver.
DRIVERS = {"file": "fsspec", "memory": "fsspec", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
CLAIMS = "claims"
_NUMBER = re.compile(r"(.+)\.(\d+)")
_MEMORY = threading.Lock()  # the driver of memory:// looks for a file and creates it in two steps


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of results behind a URL; `open_remote` checks it. It can be sent to other processes.

    All methods raise OSError if the storage fails, and FileNotFoundError if a file is missing.

    Attributes:
        url: The URL, with a scheme of `DRIVERS`.
    """

    url: str
    _opened: list[tuple[Any, str]] = field(default_factory=list, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_opened": []}  # a connection belongs to its process

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return self.url

    def _storage(self) -> tuple[Any, str]:
        """Return the driver and its name for the folder."""
        if not self._opened:
            # A listing that is kept would hide what other machines write.
            self._opened.append(fsspec.url_to_fs(self.url, use_listings_cache=False))
        return self._opened[0]

    def _of(self, name: str) -> str:
        return f"{self._storage()[1].rstrip('/')}/{name}"

    def names(self, folder: str, pattern: str = "*") -> list[str]:
        """Return the files in a folder, such as `runs`, whose names match a pattern, without temporary ones."""
        with self._errors():
            driver, _ = self._storage()
            driver.invalidate_cache()
            try:
                found = driver.ls(self._of(folder), detail=False)
            except FileNotFoundError:
                return []
            names = sorted(PurePosixPath(str(path)).name for path in found)
            return [f"{folder}/{name}" for name in names if not name.startswith(".") and fnmatchcase(name, pattern)]

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        with self._errors():
            driver, _ = self._storage()
            driver.invalidate_cache()
            return bool(driver.exists(self._of(name)))

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        with self._errors():
            return bytes(self._storage()[0].cat_file(self._of(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file; a reader sees the old or the new one, and never a part."""
        with self._errors():
            driver, _ = self._storage()
            path = self._of(name)
            if not self._is_local:
                driver.pipe_file(path, content)
                return
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(path), content)

    def create(self, name: str, content: bytes) -> bool:
        """Create a file; return False if there is one already, with other contents."""
        with self._errors():
            driver, _ = self._storage()
            path = self._of(name)
            is_memory = urlsplit(self.url).scheme == "memory"
            try:
                if self._is_local:
                    _create_file(Path(path), content)
                else:
                    with _MEMORY if is_memory else nullcontext():
                        driver.pipe_file(path, content, mode="create")
            except Exception:
                # FileExistsError, or an error of the driver's own. Drivers repeat a request whose answer was lost, so
                # the file may also be this one.
                driver.invalidate_cache()
                if not driver.exists(path):
                    raise
                return bool(driver.cat_file(path) == content)
            return True

    def remove(self, *names: str) -> None:
        """Remove files; those that are missing are ignored."""
        with self._errors():
            driver, _ = self._storage()
            for name in names:
                with suppress(FileNotFoundError):
                    driver.rm_file(self._of(name))

    def pull(self, names: Iterable[str], folder: Path) -> None:
        """Download files into a local folder of results; those that the storage lacks are ignored."""
        for name in names:
            with suppress(FileNotFoundError):
                content = self.read(name)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, content)

    def pull_records(self, folder: Path) -> None:
        """Download the records that a local folder of results lacks."""
        for name in self.names("runs", "*.json"):
            if not (folder / name).is_file():
                self.pull(_with_items(name), folder)

    def pull_record(self, name: str, folder: Path) -> None:
        """Download a record, such as `runs/ID.json`, after its items, if it exists and the local folder lacks it."""
        if not (folder / name).is_file() and self.exists(name):
            self.pull(_with_items(name), folder)

    def push_record(self, path: Path) -> bool:
        """Upload a record and its items; return False if the storage has a record of this run already.

        Args:
            path: The record's local file.
        """
        name = f"runs/{path.name}"
        items = path.with_name(path.stem + ITEMS)
        if self.exists(name):
            return False
        if items.is_file():
            self.write(f"runs/{items.name}", items.read_bytes())
        return self.create(name, path.read_bytes())

    def remove_failures(self, run_id: str) -> None:
        """Remove the records of a run's failures, after it went well."""
        names = self.names("runs", f"*{FAILED}*")
        self.remove(*(name for name in names if PurePosixPath(name).name.partition(FAILED)[0] == run_id))

    def remove_leftovers(self) -> None:
        """Remove what killed processes have left: checkpoints of recorded runs, and temporary files of this machine."""
        recorded = {PurePosixPath(name).stem for name in self.names("runs", "*.json")}
        matches = ((name, CHECKPOINT.fullmatch(PurePosixPath(name).name)) for name in self.names("checkpoints"))
        self.remove(*(name for name, match in matches if match and match[1] in recorded))
        if self._is_local:
            remove_temporary_files(Path(self._storage()[1]))

    def claim(self, run_id: str) -> RemoteClaim:
        """Return the place of the claim on a run."""
        return RemoteClaim(self, run_id)

    def claimed_runs(self) -> set[str]:
        """Return the ids of the runs that are claimed."""
        matches = (_NUMBER.fullmatch(PurePosixPath(name).name) for name in self.names(CLAIMS))
        return {match[1] for match in matches if match}

    @property
    def _is_local(self) -> bool:
        return urlsplit(self.url).scheme == "file"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the drivers and of their network libraries into OSError."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class RemoteClaim:
    """The claim on a run in a `RemoteFolder`; see the top of this module.

    Attributes:
        folder: The folder.
        run_id: Id of the run.
    """

    folder: RemoteFolder
    run_id: str

    def __str__(self) -> str:
        return f"{self.folder}/{CLAIMS}/{self.run_id}"

    def read(self) -> ClaimState | None:
        """Return the state of the claim that holds, or None if there is none."""
        for number in reversed(self._numbers()):
            with suppress(FileNotFoundError):  # removed since the listing
                return self._read(number)
        return None

    def create(self, text: str, instead_of: ClaimState | None) -> bool:
        """Make a new claim, and return whether this process has it; see `ClaimPlace`."""
        numbers = self._numbers()
        last = numbers[-1] if numbers else 0
        if instead_of is None:
            return not numbers and self.folder.create(self._name(1), _content(text, 0))
        if not numbers or not self._is(last, instead_of):
            return False
        if not self.folder.create(self._name(last + 1), _content(text, 0)):
            return False
        if self._is(last, instead_of):
            return True
        self.folder.remove(self._name(last + 1))  # its owner lives, or has ended and the run is another's
        return False

    def refresh(self, text: str) -> None:
        """Write the claim anew, with another number in its second line."""
        if number := self._number_of(text):
            self.folder.write(self._name(number), _content(text, time.time_ns()))

    def remove(self, text: str) -> None:
        """Remove the claim and those that it has replaced."""
        if number := self._number_of(text):
            self.folder.remove(*(self._name(one) for one in self._numbers() if one <= number))

    def _number_of(self, text: str) -> int | None:
        """Return the number of the claim with this text, if it is the one that holds."""
        numbers = self._numbers()
        with suppress(FileNotFoundError):
            if numbers and self._read(numbers[-1]).text == text:
                return numbers[-1]
        return None

    def _numbers(self) -> list[int]:
        """Return the numbers of all claims on the run, ascending."""
        matches = (_NUMBER.fullmatch(PurePosixPath(name).name) for name in self.folder.names(CLAIMS))
        return sorted(int(match[2]) for match in matches if match and match[1] == self.run_id)

    def _name(self, number: int) -> str:
        return f"{CLAIMS}/{self.run_id}.{number}"

    def _read(self, number: int) -> ClaimState:
        text, _, refreshed = self.folder.read(self._name(number)).decode("utf-8", "replace").partition("\n")
        return ClaimState(text, int(refreshed) if refreshed.isdecimal() else 0)

    def _is(self, number: int, state: ClaimState) -> bool:
        with suppress(FileNotFoundError):
            return self._read(number) == state
        return False


def open_remote(url: str) -> RemoteFolder:
    """Return the folder of a URL, after a check that its storage can be used.

    Raises:
        UserError: The URL is of another kind, its driver is not installed or too old, or the storage does not answer.
    """
    scheme = urlsplit(url).scheme
    if "://" not in url or scheme not in DRIVERS or "::" in url:
        kinds = ", ".join(f"{name}://" for name in DRIVERS)
        raise UserError(
            f"--storage {url} is not of a kind in which a file can be created exclusively ({kinds}); "
            "for a folder that all machines mount use --results."
        )
    folder = RemoteFolder(url)
    try:
        driver, path = folder._storage()
    except ImportError as error:
        raise UserError(
            f"--storage {url} needs the package {DRIVERS[scheme]}: pip install {DRIVERS[scheme]}."
        ) from error
    except Exception as error:
        raise UserError(f"--storage {url} cannot be opened ({_first_line(error)}).") from error
    if not path.strip("/"):
        raise UserError(f"--storage {url} names no folder; add one, such as {url.rstrip('/')}/results.")
    create = getattr(driver, "_pipe_file", None) or driver.pipe_file
    if "mode" not in inspect.signature(create).parameters:
        raise UserError(
            f"--storage {url} needs a newer {DRIVERS[scheme]}, one that creates files exclusively: "
            f"pip install --upgrade {DRIVERS[scheme]}."
        )
    try:
        folder.names("runs")
    except OSError as error:
        raise UserError(f"--storage {url} does not answer ({_first_line(error)}).") from error
    return folder


def place_of_claim(run_id: str, results: Path, storage: RemoteFolder | None) -> Path | ClaimPlace:
    """Return the place of the claim on a run: in the storage, or in a folder of results that all machines mount."""
    return storage.claim(run_id) if storage else claim_path(run_id, results)


def _with_items(name: str) -> list[str]:
    """Return the files of a record, which comes last."""
    return [name.removesuffix(".json") + ITEMS, name]


def _content(text: str, refreshed: int) -> bytes:
    return f"{text}\n{refreshed}".encode()


def _create_file(path: Path, content: bytes) -> None:
    """Create a file with its contents at once: a reader never sees a part of it.

    Raises:
        FileExistsError: There is one already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary_path(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))  # threads may try it at once
    try:
        aside.write_bytes(content)
        os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
