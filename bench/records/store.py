"""One run, one file. The only room that reads or writes `results/`.

A folder of results holds `runs/<id>.json` and, beside each, `runs/<id>.items.csv.gz` with one outcome for every item.
A record is written once, whole or not at all: first the items, then the JSON under a temporary name that is renamed.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bench.errors import UserError
from bench.records.provenance import ROOT, commit_of
from bench.records.schema import SCHEMA, SPEED_SCHEMA, Record, RunConfig, SpeedRecord

RESULTS = ROOT / "results"


def open_folder(folder: Path) -> None:
    """Make a folder of records, before the work that is to be written there.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--results {folder} cannot be a folder of records ({error.strerror}); name another."
        ) from error
    if not os.access(folder / "runs", os.W_OK):
        raise UserError(f"--results {folder} cannot be written to; name another folder.")


def write_speed(record: SpeedRecord, folder: Path) -> Path:
    """Write a record of speed into `folder/runs`; returns its path."""
    path = folder / "runs" / f"{record.id}.json"
    open_folder(folder)
    _replace(path, (json.dumps({"schema": SPEED_SCHEMA, **dataclasses.asdict(record)}, indent=1) + "\n").encode())
    return path


def read_speed(folder: Path) -> list[SpeedRecord]:
    """Every record of speed in a folder, the latest last.

    Raises:
        UserError: a record is broken or of another schema.
    """
    records = []
    for path in (folder / "runs").glob("*.json"):
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict) or content.pop("schema") != SPEED_SCHEMA:
                raise ValueError(f"this version reads schema {SPEED_SCHEMA}")
            records.append(SpeedRecord(**content))
            records[-1].id  # noqa: B018  (a record without its time is broken too)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a whole record of speed ({error}); delete or restore it.") from error
    return sorted(records, key=lambda record: (record.provenance["time"], record.id))


def write(record: Record, folder: Path) -> Path:
    """Write a record into `folder/runs`; returns its path. A failed run never stands where a result should."""
    open_folder(folder)
    runs = folder / "runs"
    name = record.config.id + (f".failed-{time.strftime('%Y%m%dT%H%M%S')}" if record.status == "failed" else "")
    if record.items:
        _replace(runs / f"{name}.items.csv.gz", _items_to_bytes(record.items))
    content = {"schema": SCHEMA, "id": record.config.id, "status": record.status, "config_hash": record.config.hash}
    content |= {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in ("items", "path")}
    content["config"] = dataclasses.asdict(record.config)
    content["items"] = f"{name}.items.csv.gz" if record.items else None
    record.path = runs / f"{name}.json"
    _replace(record.path, (json.dumps(content, indent=1) + "\n").encode())
    return record.path


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: the file, or the items file that belongs to it, is broken or of another schema.
    """
    try:
        content = {"inside": None} | json.loads(path.read_text())  # older records do not have it
        if content["schema"] != SCHEMA:
            raise UserError(f"{path} has schema {content['schema']}, this version reads {SCHEMA}; move it away.")
        items = content["items"]
        fields = {
            f.name: content[f.name] for f in dataclasses.fields(Record) if f.name not in ("items", "path", "config")
        }
        return Record(
            config=RunConfig(**content["config"]),
            items=_items_from_bytes((path.parent / items).read_bytes()) if items else None,
            path=path,
            **fields,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a whole record ({type(error).__name__}: {error}). Nothing was changed; "
            "delete or restore it and its items file, and the run will be made again."
        ) from error


def read_all(folder: Path) -> list[Record]:
    """Every result in a folder, sorted by id; failed runs are left out.

    Raises:
        UserError: a record is broken.
    """
    return [read(path) for path in sorted((folder / "runs").glob("*.json")) if ".failed-" not in path.name]


def find(config: RunConfig, folder: Path) -> Record | None:
    """The record of this very configuration, if the folder has it."""
    path = folder / "runs" / f"{config.id}.json"
    return read(path) if path.is_file() else None


def publish(records: Iterable[Record | SpeedRecord], folder: Path) -> tuple[list[Path], list[str]]:
    """Copy records to `folder/runs`; returns the new paths, and of those that may not be published each the reason.

    Only whole runs of committed code are published, under the commit whose sources they were made from: the machine may
    have had a copy of the tree without its history, or with an older one. What is there is never replaced.
    """
    paths, refused = [], []
    for record in records:
        if not record.complete:
            refused.append(f"{record.id} was cut short (max_steps or max_items; layers, of speed)")
        elif (folder / "runs" / f"{record.id}.json").exists():
            continue
        elif (commit := commit_of(record.provenance["source_sha256"], record.provenance["commit"])) is None:
            refused.append(f"{record.id} was made from code that no commit here has; commit, then run again")
        else:
            committed = replace(record, provenance=record.provenance | {"commit": commit, "dirty": False})
            if not (folder / "runs" / f"{committed.id}.json").exists():  # a speed record's id is of its commit, too
                paths.append((write_speed if isinstance(record, SpeedRecord) else write)(committed, folder))
    return paths, refused


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _items_to_bytes(items: dict[str, list[float]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "item", "correct"])
    writer.writerows((task, number, right) for task, rights in items.items() for number, right in enumerate(rights))
    return gzip.compress(text.getvalue().encode(), mtime=0)  # the same items give the same bytes


def _items_from_bytes(content: bytes) -> dict[str, list[float]]:
    items: dict[str, list[float]] = {}
    for row in csv.DictReader(io.StringIO(gzip.decompress(content).decode())):
        items.setdefault(row["task"], []).append(json.loads(row["correct"]))
    return items
