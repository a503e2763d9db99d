"""Read files of JSON Lines, gzipped or not, with errors that name the line."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from tasks.errors import DataError
from tasks.fields import Record

# Text packs to a third or a thirtieth of its size. A small file that unpacks to gigabytes is made to take memory.
MAX_RATIO = 100
MIN_LIMIT = 64 << 20  # bytes of unpacked text that are read from any file
_CHUNK = 1 << 20  # bytes
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json_lines(path: Path) -> list[tuple[int, Record]]:
    """Return the records of a file with their line numbers, from 1. Blank lines are skipped.

    A file whose name ends with `.gz` is gzipped. The encoding is UTF-8, with or without a byte order mark.

    Raises:
        DataError: The file cannot be read, is damaged or has no record. Or a line is not one JSON object with different
            keys and finite numbers.
    """
    try:
        content = _unpack(path) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is broken ({error}); fetch it again.") from error
    lines = content.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    records = [(number, _parse_line(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise DataError(f"{path} is empty: it has no record; fetch it again.")
    return records


def _unpack(path: Path) -> bytes:
    """Unpack a gzipped file.

    Raises:
        DataError: It unpacks to more than `MAX_RATIO` times its size, and more than `MIN_LIMIT`.
    """
    limit = max(MIN_LIMIT, MAX_RATIO * path.stat().st_size)
    chunks: list[bytes] = []
    size = 0
    with gzip.open(path) as file:
        while chunk := file.read(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise DataError(
                    f"{path} unpacks to more than {limit / 1e6:,.0f} MB, over {MAX_RATIO} times its size, as no text "
                    "does; fetch it again."
                )
    return b"".join(chunks)


def _parse_line(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line.decode(), object_pairs_hook=_to_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); fetch the file again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error}); fetch the file again or convert it.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: {error}; mend the line or fetch the file again.") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: not a JSON object; fetch the file again.")
    return record


def _to_object(pairs: list[tuple[str, Any]]) -> Record:
    """Return a JSON object, if its keys differ; Python would keep the last of equal ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
