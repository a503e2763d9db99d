"""One run, one file. The only room that reads or writes `results/`.

A folder of results holds `runs/<id>.json` and, beside each, `runs/<id>.items.csv.gz` with one outcome for every item.
A record is written once, whole or not at all: first the items, then the JSON under a temporary name that is renamed.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import UserError

SCHEMA = 2  # in runs of 1 batches were of like length
SPEED_SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
SOURCES = ("malora", "tasks", "bench")  # what a run's outcome depends on


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's outcome depends on, as far as we choose it. Its hash names the run.

    `learning_rate` is None for the base model, which is scored and not trained. `max_steps` and `max_items` cut a run
    short for trying things out; such a record is not published.
    """

    profile: str
    model: str
    model_hash: str
    method: str
    method_options: dict[str, Any]
    mixture: str
    format: str
    data_hash: str
    seed: int
    learning_rate: float | None
    epochs: int
    batch_size: int
    warmup_ratio: float
    weight_decay: float
    balance_factor: float
    max_grad_norm: float
    max_length: int
    device_type: str
    max_steps: int | None = None
    max_items: int | None = None

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def id(self) -> str:
        """A name that a person can read and that no other configuration has."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.mixture.replace('/', '-')}-{self.format}-{self.method}{rate}-s{self.seed}-{self.hash[:8]}"

    def but(self, *fields: str) -> tuple:
        """The configuration without the named fields: runs that agree in it differ only there."""
        return tuple((k, repr(v)) for k, v in dataclasses.asdict(self).items() if k not in fields)


@dataclass
class Record:
    """What a run gave. Unknown is None.

    Attributes:
        status: ok, diverged (a loss or gradient was not finite), oom or failed.
        parameters: trainable, total, adapter_bytes.
        train: steps, tokens, seconds by part, loss curve, peak bytes, router statistics.
        validation, test: task -> metric, value, stderr, n, version. Rates are chosen on validation alone.
        inside: of a routed adapter: similarity, spectra, movement, routing, as `bench.inside` gives them.
        items: task -> outcomes (1 right, 0 wrong, of ROUGE-L what is between) of the test, in its order; kept in the
            file beside.
    """

    config: RunConfig
    status: str
    provenance: dict[str, Any]
    parameters: dict[str, int] | None = None
    data: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    validation: dict[str, dict[str, Any]] | None = None
    test: dict[str, dict[str, Any]] | None = None
    inside: dict[str, Any] | None = None
    items: dict[str, list[float]] | None = None
    error: str | None = None
    path: Path | None = None

    @property
    def id(self) -> str:
        return self.config.id

    @property
    def complete(self) -> bool:
        """Whether the run was the whole of what it stands for."""
        return self.config.max_steps is None and self.config.max_items is None

    def mean(self, split: str = "test") -> float | None:
        """Mean over tasks of the split's scores, in percent; None without them."""
        scores = getattr(self, split)
        return 100 * sum(s["value"] for s in scores.values()) / len(scores) if scores else None


@dataclass
class SpeedRecord:
    """What one call of `python -m bench.speed` measured. Unknown is None.

    Attributes:
        shape: name of the backbone.
        mode: train, prefill, decode, or layer where one linear map was measured.
        options: what the call was asked for; `layers` cuts the depth for trying things out, and is not published.
        ceilings: before and after: matrix_flops_per_second, copy_bytes_per_second.
        rows: one a variant, in the order of measuring, with every sample.
    """

    shape: str
    mode: str
    options: dict[str, Any]
    provenance: dict[str, Any]
    ceilings: dict[str, dict[str, float]]
    rows: list[dict[str, Any]]

    @property
    def id(self) -> str:
        """Made of when it was measured, for the same call may be made often, and of what it holds."""
        content = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
        when = self.provenance["time"].translate({ord("-"): None, ord(":"): None})
        return f"{self.shape}-{self.mode}-{when}-{content[:8]}"

    @property
    def complete(self) -> bool:
        return self.options["layers"] is None


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


@cache
def commit_of(sources: str, likely: str | None) -> str | None:
    """The commit with these sources, by their hash: the likely one, or the latest; None if this clone has none."""
    try:
        commits = _git("rev-list", "--max-count=200", "HEAD", "--", *SOURCES).splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((commit for commit in filter(None, [likely, *commits]) if source_hash_of(commit) == sources), None)


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


def provenance(device: torch.device, jobs: int) -> dict[str, Any]:
    """Where a run was made: code, packages, machine. Its seconds are no speed where `jobs` of a command shared that.

    What else ran there is not known.
    """
    commit, dirty = _git_state()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "dirty": dirty,
        "source_sha256": source_hash(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "concurrent_runs": jobs,
    }


PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "lm-eval", "accelerate", "datasets")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _git_state() -> tuple[str | None, bool | None]:
    """Commit, and whether the sources differ from it; None where there is no history. `publish` goes by the sources."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return commit, bool(_git("status", "--porcelain", "--", *SOURCES).strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@cache
def source_hash() -> str:
    """sha256 over names and contents of the Python sources in the working tree."""
    paths = sorted(path for name in SOURCES for path in (ROOT / name).rglob("*.py"))
    return _hash_sources((path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths)


@cache
def source_hash_of(commit: str) -> str | None:
    """The same over a commit; None if this clone does not have it."""
    try:
        names = _git("ls-tree", "-r", "--name-only", commit, "--", *SOURCES).splitlines()
        names = sorted((n for n in names if n.endswith(".py")), key=lambda name: ROOT / name)
        return _hash_sources((name, _git("show", f"{commit}:{name}")) for name in names)
    except (OSError, subprocess.CalledProcessError):
        return None


def _hash_sources(files: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, text in files:
        digest.update(f"{name}\n{len(text)}\n{text}".encode())
    return digest.hexdigest()
