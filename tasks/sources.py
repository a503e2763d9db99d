"""Where records come from: the Hugging Face hub, a folder of `*.jsonl.gz`, or a generator."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.base import DataRef
from tasks.errors import DataError
from tasks.procedural import GENERATORS
from tasks.procedural_inter import WRITERS


@dataclass(frozen=True)
class Folder:
    """A folder with one gzipped JSON-lines file a split, `{file}_{split}.jsonl.gz`."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise DataError(f"{self.path} is not a folder; give --data the folder that holds the *.jsonl.gz files.")

    def read(self, ref: DataRef, split: str) -> list[dict]:
        """The split's records, in file order.

        Raises:
            DataError: the file is missing, not gzip, cut off, or a line of it is not a JSON object.
        """
        path = self.path / f"{ref.file}_{split}.jsonl.gz"
        if not path.is_file():
            there = ", ".join(sorted(p.name for p in self.path.glob("*.jsonl.gz"))) or "no *.jsonl.gz file at all"
            raise DataError(f"{path} is missing; the folder has {there}.")
        try:
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                return [_record(path, number, line) for number, line in enumerate(lines, 1)]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is broken ({error}); fetch it again.") from error


def _record(path: Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); fetch the file again.") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: not a JSON object; fetch the file again.")
    return record


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, or datasets' cache of it."""

    def read(self, ref: DataRef, split: str) -> list[dict]:
        """The split's records, with the names of classes in place of their numbers.

        Raises:
            DataError: the hub cannot be reached, or does not have the split.
        """
        if not ref.hub:
            raise DataError(f"{ref.file} is not on the hub; give --data a folder that has {ref.file}_{split}.jsonl.gz.")
        try:
            return _from_hub(ref, ref.hub_splits.get(split, split))
        except Exception as error:  # datasets raises whatever its transports raise
            raise DataError(
                f"cannot read {ref.hub} ({split}) from the Hugging Face hub: {type(error).__name__}: {error}. "
                "Give --data a folder of *.jsonl.gz files, or use --profile tiny, which needs no data."
            ) from error


def _from_hub(ref: DataRef, split: str) -> list[dict]:
    import datasets  # two seconds to import, and only needed here

    try:
        rows = datasets.load_dataset(ref.hub, ref.config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # datasets 4 runs no code of a data set's own. What it made, the hub keeps as Parquet, a folder a configuration.
        rows = datasets.load_dataset(ref.hub, data_dir=ref.config, split=split, revision="refs/convert/parquet")
    classes = {name: f.names for name, f in rows.features.items() if isinstance(f, datasets.ClassLabel)}
    return [row | {name: names[row[name]] for name, names in classes.items()} for row in rows]


@dataclass(frozen=True)
class Generator:
    """The procedural suite: records that are made, not read. The same ones every time, whatever the run's seed."""

    sizes: tuple[tuple[str, int], ...] = (("train", 2000), ("validation", 100), ("test", 200))  # a task's, by split

    def read(self, ref: DataRef, split: str) -> list[dict]:
        """The split's records.

        Raises:
            DataError: the task is not one that is generated.
        """
        generators = GENERATORS | WRITERS
        if ref.file not in generators:
            raise DataError(f"{ref.file} is not generated; give --data a folder, or use a profile that has the hub.")
        rng = random.Random(f"{ref.file}/{split}")
        return [asdict(generators[ref.file](rng)) for _ in range(dict(self.sizes)[split])]
