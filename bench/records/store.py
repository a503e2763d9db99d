"""Reading, writing and publishing of records.

Only this package reads or writes the records below `results/`. A folder of results has `runs/<id>.json` and, for each
run, `runs/<id>.items.csv.gz` with the outcome of every test item. A record is written once: first the items, then the
JSON file. It has hashes of itself and of its items file, so that a later edit of either is found.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from bench.errors import UserError
from bench.records.files import write_atomically
from bench.records.provenance import ROOT, commit_of
from bench.records.schema import SCHEMA, GoldAnswers, Number, Record, RunConfig, RunSections, TaskScore
from bench.records.speed_schema import SPEED_SCHEMA, SpeedRecord

RESULTS = ROOT / "results"
# Earlier records lack them. Of those without hashes only what the items give can be checked.
LATER_FIELDS = {"inside", "items_sha256", "content_sha256"}
FAILED = re.compile(r"\.failed-\d{8}T\d{6}$")  # ends the name of a failed run's record
# A score is the mean of its items, which lm-eval sums in another order: double precision differs in the last digits.
SCORE_TOLERANCE = 1e-9
MAX_ITEMS_BYTES = 32 << 20  # of an unpacked items file, more than a million items; a small file can unpack to gigabytes
ITEM_COLUMNS = ("task", "item", "correct")
GOLD_COLUMNS = (*ITEM_COLUMNS, "nats", "label_tokens", "class")  # of a record with losses; see `GoldAnswers`


class _RunFile(RunSections):
    """Contents of `runs/<id>.json`: sections, and fields that must agree with them.

    Attributes:
        items: Name of the items file.
        items_sha256: Hash of the items file's bytes; None without items, and in older records.
        content_sha256: Hash of all other fields, see `_hash_content`; None in older records.
    """

    schema_version: Literal[2] = Field(alias="schema")
    id: str
    config_hash: str
    items: str | None
    items_sha256: str | None = None
    content_sha256: str | None = None

    def sections(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in RunSections.model_fields}


class _SpeedFile(SpeedRecord):
    """Contents of a speed record's file."""

    schema_version: Literal[1] = Field(alias="schema")


def open_folder(folder: Path) -> None:
    """Create a folder of records before the work whose results go there.

    Raises:
        UserError: it cannot be created or written to.
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
    """Write a speed record into `folder/runs` and return its path."""
    path = folder / "runs" / f"{record.id}.json"
    open_folder(folder)
    write_atomically(path, json.dumps({"schema": SPEED_SCHEMA, **record.to_json()}, indent=1) + "\n")
    return path


def read_speed(folder: Path) -> list[SpeedRecord]:
    """Read every speed record of a folder, the latest last.

    Raises:
        UserError: a record is broken, of another schema, or not the one that its file name says.
    """
    records = [_read_speed_file(path) for path in (folder / "runs").glob("*.json")]
    return sorted(records, key=lambda record: (record.provenance.time, record.id))


def _read_speed_file(path: Path) -> SpeedRecord:
    try:
        text = path.read_text(encoding="utf-8")
        _require_schema(path, text, SPEED_SCHEMA)
        content = _SpeedFile.model_validate_json(text, strict=True)
    except (OSError, ValueError) as error:
        raise _broken(path, error, "speed record") from error
    fields = {name: getattr(content, name) for name in SpeedRecord.model_fields}
    record = SpeedRecord.model_validate(fields)
    _require_equal(path, "file name", path.stem, record.id)
    return record


def write(record: Record, folder: Path) -> Path:
    """Write a record into `folder/runs` and return its path.

    A failed run gets a name of its own, so that it is never taken for a result.
    """
    open_folder(folder)
    runs = folder / "runs"
    name = record.config.id + (f".failed-{time.strftime('%Y%m%dT%H%M%S')}" if record.status == "failed" else "")
    items = _items_to_bytes(record.items, record.gold) if record.items else None
    if items is not None:
        write_atomically(runs / f"{name}.items.csv.gz", items)
    content = {"schema": SCHEMA, "id": record.config.id, "status": record.status, "config_hash": record.config.hash}
    content |= {section: _to_json(getattr(record, section)) for section in RunSections.model_fields}
    content["items"] = None if items is None else f"{name}.items.csv.gz"
    content["items_sha256"] = None if items is None else hashlib.sha256(items).hexdigest()
    content["content_sha256"] = _hash_content(content)
    record.path = runs / f"{name}.json"
    write_atomically(record.path, json.dumps(content, indent=1) + "\n")
    return record.path


def _hash_content(content: Mapping[str, Any]) -> str:
    """Return the hex sha256 of a record's fields as sorted JSON, without the field that has the hash."""
    fields = {name: value for name, value in content.items() if name != "content_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _to_json(section: Any) -> Any:
    """Return a section, or sections by task, as plain values."""
    if isinstance(section, dict):
        return {task: score.to_json() for task, score in section.items()}
    return section.to_json() if hasattr(section, "to_json") else section


def read(path: Path) -> Record:
    """Read a record; check that its file name, configuration, scores, items and hashes agree.

    Raises:
        UserError: the file or its items file is broken, of another schema, or contradicts itself.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _require_schema(path, text, SCHEMA)
        content = _RunFile.model_validate_json(text, strict=True)
        _require_sections(content)
    except (OSError, ValueError) as error:
        raise _broken(path, error) from error
    mark = FAILED.search(path.stem)
    suffix = (mark.group() if mark else ".failed-TIME") if content.status == "failed" else ""
    _require_equal(path, "file name", path.stem, content.config.id + suffix)
    _require_equal(path, "id", content.id, content.config.id)
    _require_equal(path, "config_hash", content.config_hash, content.config.hash)
    _require_equal(path, "items file", content.items, f"{path.stem}.items.csv.gz" if content.test else None)
    items, gold = _read_items(path, content) if content.items else (None, None)
    if content.content_sha256 is not None:  # last, because the checks above say what differs
        _require_equal(path, "content_sha256", content.content_sha256, _hash_content(json.loads(text)))
    # The sections and the items have been validated above.
    return Record.model_construct(**content.sections(), items=items, gold=gold, path=path)


def _read_items(path: Path, content: _RunFile) -> tuple[dict[str, list[Number]], dict[str, GoldAnswers] | None]:
    """Read the items of a record; check that its test scores follow from them, and their hash."""
    assert content.items is not None
    try:
        stored = (path.parent / content.items).read_bytes()
        items, gold = _items_from_bytes(stored)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _broken(path, error) from error
    _require_scores_of(path, content.test or {}, items)
    _require_losses_of(path, content.test or {}, items, gold)
    if content.items_sha256 is not None:
        _require_equal(path, "items_sha256", content.items_sha256, hashlib.sha256(stored).hexdigest())
    return items, gold


def _require_schema(path: Path, text: str, schema: int) -> None:
    content = json.loads(text)
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError("without a schema")
    if content["schema"] != schema:
        raise UserError(f"{path} has schema {content['schema']}, this version reads {schema}; move it away.")


def _require_sections(content: _RunFile) -> None:
    """Check that no field is missing.

    A run that ended well must have the sections of one.
    """
    missing = _RunFile.model_fields.keys() - content.model_fields_set - LATER_FIELDS
    if content.status == "ok":
        is_base = content.config.learning_rate is None
        expected = ("data", "test") if is_base else ("parameters", "data", "train", "validation", "test")
        missing |= {section for section in expected if getattr(content, section) is None}
    if missing:
        raise ValueError(f"without {', '.join(sorted(missing))}")


def _broken(path: Path, error: Exception, kind: str = "record") -> UserError:
    """Return the error for a file that cannot be read as a record."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, ValidationError):
        first, *others = error.errors()
        where = ".".join(map(str, first["loc"]))
        problem = f"{where}: {first['msg']}" + (f", and {len(others)} more" if others else "")
    else:
        problem = f"{type(error).__name__}: {error}"
    return UserError(
        f"{path} is not a complete {kind} ({problem}). Nothing was changed; "
        "delete or restore it and its items file, and the run will be made again."
    )


def _require_equal(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise UserError(
            f"{path}: its {what} is {found}, but its contents give {expected}; "
            "it was renamed or edited, so delete or restore it."
        )


def _require_scores_of(path: Path, scores: Mapping[str, TaskScore], items: Mapping[str, list[Number]]) -> None:
    """Check that each test score is the mean of the task's items, with the standard error of that mean."""
    _require_equal(path, "items file's list of tasks", sorted(items), sorted(scores))
    for task, score in scores.items():
        outcomes = items[task]
        _require_equal(path, f"number of items of {task}", len(outcomes), score.n)
        mean = math.fsum(outcomes) / len(outcomes)
        if abs(mean - score.value) > SCORE_TOLERANCE:
            _require_equal(path, f"score of {task}", score.value, mean)
        stderr = _standard_error(outcomes, mean)
        if score.stderr is None or stderr is None or abs(stderr - score.stderr) > SCORE_TOLERANCE:
            _require_equal(path, f"standard error of {task}", score.stderr, stderr)


def _require_losses_of(
    path: Path,
    scores: Mapping[str, TaskScore],
    items: Mapping[str, list[Number]],
    gold: Mapping[str, GoldAnswers] | None,
) -> None:
    """Check that losses and balanced accuracies follow from the losses and classes of the items."""
    for task, score in scores.items():
        expected = gold[task].summary(items[task]) if gold else {}
        for name in ("loss", "label_tokens", "classes", "largest_class", "balanced"):
            found, value = getattr(score, name), expected.get(name)
            if found is None or value is None or abs(found - value) > SCORE_TOLERANCE:
                _require_equal(path, f"{name} of {task}", found, value)


def _standard_error(outcomes: list[Number], mean: float) -> float | None:
    """Return the standard error of a mean, or None for a single outcome."""
    n = len(outcomes)
    return math.sqrt(math.fsum((outcome - mean) ** 2 for outcome in outcomes) / (n - 1) / n) if n > 1 else None


def read_all(folder: Path) -> list[Record]:
    """Read every result of a folder, sorted by id; failed runs are left out.

    Raises:
        UserError: a record is broken.
    """
    return [read(path) for path in sorted((folder / "runs").glob("*.json")) if not FAILED.search(path.stem)]


def find(config: RunConfig, folder: Path) -> Record | None:
    """Read the record of exactly this configuration, or return None."""
    path = folder / "runs" / f"{config.id}.json"
    return read(path) if path.is_file() else None


def publish(
    records: Iterable[Record | SpeedRecord], folder: Path, *, cut_short: bool = False
) -> tuple[list[Path], list[str]]:
    """Copy records to `folder/runs`.

    Only complete runs of committed code are published, or with `cut_short` only incomplete ones. A machine may have had
    the sources without their git history, so the commit is found by the hash of the sources. An existing record is
    never replaced.

    Returns:
        The paths of the new records, and a reason for every record that may not be published.
    """
    paths, refused = [], []
    for record in records:
        provenance = record.provenance
        if record.complete and cut_short:
            refused.append(f"{record.id} is complete; publish it without --trials")
        elif not (record.complete or cut_short):
            refused.append(f"{record.id} was cut short (max_steps or max_items; layers, of speed)")
        elif (folder / "runs" / f"{record.id}.json").exists():
            continue
        elif (commit := commit_of(provenance.source_sha256, provenance.commit)) is None:
            refused.append(f"{record.id} was made from code that no commit here has; commit, then run again")
        else:
            committed = record.replace(provenance=provenance.replace(commit=commit, dirty=False))
            if not (folder / "runs" / f"{committed.id}.json").exists():  # the commit is part of a speed record's id
                written = (
                    write_speed(committed, folder) if isinstance(committed, SpeedRecord) else write(committed, folder)
                )
                paths.append(written)
    return paths, refused


def _items_to_bytes(items: Mapping[str, list[Number]], gold: Mapping[str, GoldAnswers] | None) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(GOLD_COLUMNS if gold else ITEM_COLUMNS)
    for task, rights in items.items():
        columns: list[Iterable[object]] = [itertools.repeat(task), range(len(rights)), rights]
        if gold:
            one = gold[task]
            columns += [one.nats, one.label_tokens, itertools.repeat("") if one.classes is None else one.classes]
        writer.writerows(zip(*columns, strict=False))
    return gzip.compress(text.getvalue().encode(), mtime=0)  # the same items give the same bytes


def _items_from_bytes(content: bytes) -> tuple[dict[str, list[Number]], dict[str, GoldAnswers] | None]:
    """Return the outcomes by task, and losses and classes if the file has them.

    A folder of results has a million of them, and `csv.reader` takes six times as long. So the text is split at once,
    since no task's name has a comma, and each distinct outcome is parsed once.
    """
    with gzip.open(io.BytesIO(content)) as file:
        unpacked = file.read(MAX_ITEMS_BYTES + 1)
    if len(unpacked) > MAX_ITEMS_BYTES:
        raise ValueError(f"the items file unpacks to more than {MAX_ITEMS_BYTES / 1e6:,.0f} MB")
    header, _, text = unpacked.decode().partition("\n")
    columns = next((c for c in (ITEM_COLUMNS, GOLD_COLUMNS) if header == ",".join(c)), None)
    if columns is None:
        raise ValueError(f"the items file has the columns {header}")
    *cells, end = text.replace("\n", ",").split(",")
    if end or len(cells) % len(columns):
        raise ValueError("the items file ends within a line")
    tasks, numbers, outcomes, *others = (cells[place :: len(columns)] for place in range(len(columns)))
    values = {outcome: _outcome_from_text(outcome) for outcome in set(outcomes)}
    items: dict[str, list[Number]] = {}
    gold: dict[str, GoldAnswers] = {}
    first = 0
    for task, lines in itertools.groupby(tasks):
        after = first + sum(1 for _ in lines)
        if task in items or numbers[first:after] != [str(number) for number in range(after - first)]:
            raise ValueError(f"the items of {task} are not numbered from 0 on")
        items[task] = [values[outcome] for outcome in outcomes[first:after]]
        if others:
            gold[task] = _gold_from_texts(*(column[first:after] for column in others))
        first = after
    return items, gold if others else None


def _gold_from_texts(nats: list[str], label_tokens: list[str], classes: list[str]) -> GoldAnswers:
    """Return the losses and classes of a task's items."""
    known = classes if any(classes) else None
    found = GoldAnswers(
        nats=list(map(float, nats)),
        label_tokens=list(map(int, label_tokens)),
        classes=None if known is None else list(map(int, known)),
    )
    if not all(0 <= value < math.inf for value in found.nats) or min(found.label_tokens) < 1:
        raise ValueError("the items file has a loss below 0 or an answer without tokens")
    return found


def _outcome_from_text(text: str) -> Number:
    value = json.loads(text)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"the items file has the outcome {text}, which is not a number from 0 to 1")
    return value  # type: ignore[no-any-return]
