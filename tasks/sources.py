"""Sources of records: the Hugging Face hub, a folder, or a generator.

The files of a folder are `*.jsonl.gz`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.base import DataRef, Item, Record
from tasks.errors import DataError
from tasks.json_lines import read_json_lines
from tasks.procedural import GENERATORS
from tasks.procedural_inter import WRITERS


@dataclass(frozen=True)
class Folder:
    """A folder with one gzipped JSON Lines file per split, `{file}_{split}.jsonl.gz`.

    Raises:
        DataError: The path is not a folder.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise DataError(f"{self.path} is not a folder; give --data the folder that holds the *.jsonl.gz files.")

    def read(self, ref: DataRef, split: str) -> list[Record]:
        """Read the records of a split, in file order.

        Raises:
            DataError: The file is missing, damaged or empty, or one of its lines is not a JSON object.
        """
        path = self._path(ref, split)
        if not path.is_file():
            others = ", ".join(sorted(other.name for other in self.path.glob(f"{ref.file}_*.jsonl.gz")))
            raise DataError(
                f"{path} is missing; the folder has {others or 'no file'} of this data set. Add the missing file, or "
                "give --data another folder."
            )
        return [record for _, record in read_json_lines(path)]

    def locate(self, ref: DataRef, split: str, number: int) -> str:
        """Return the file and line of a record."""
        path = self._path(ref, split)
        return f"{path}, line {read_json_lines(path)[number][0]}"

    def _path(self, ref: DataRef, split: str) -> Path:
        return self.path / f"{ref.file}_{split}.jsonl.gz"


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, or the local cache of `datasets`."""

    def read(self, ref: DataRef, split: str) -> list[Record]:
        """Read the records of a split, with class names instead of class numbers.

        Raises:
            DataError: The hub cannot be reached, or does not have the split.
        """
        if not ref.hub:
            raise DataError(f"{ref.file} is not on the hub; give --data a folder that has {ref.file}_{split}.jsonl.gz.")
        try:
            return _load_from_hub(ref, ref.hub_splits.get(split, split))
        except Exception as error:  # datasets passes on any exception of its HTTP clients
            raise DataError(
                f"cannot read {ref.hub} ({split}) from the Hugging Face hub: {type(error).__name__}: {error}. "
                "Give --data a folder of *.jsonl.gz files, or use --profile tiny, which needs no data."
            ) from error

    def locate(self, ref: DataRef, split: str, number: int) -> str:
        """Return the data set, split and number of a record."""
        return f"{ref.hub} ({ref.hub_splits.get(split, split)}), record {number}"


def _load_from_hub(ref: DataRef, split: str) -> list[Record]:
    import datasets  # takes two seconds, and only this function needs it

    try:
        records = datasets.load_dataset(ref.hub, ref.config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # datasets 4 runs no loading scripts. The hub keeps their output as Parquet, one folder per configuration.
        records = datasets.load_dataset(ref.hub, data_dir=ref.config, split=split, revision="refs/convert/parquet")
    classes = [
        (name, feature.names) for name, feature in records.features.items() if isinstance(feature, datasets.ClassLabel)
    ]
    return [
        # A hidden label is -1 or null. Python would take -1 for the last class.
        record | {name: names[i] if (i := record[name]) is not None and i >= 0 else None for name, names in classes}
        for record in records
    ]


@dataclass(frozen=True)
class Generator:
    """The generator of the procedural tasks.

    Its records do not depend on a run's seed.

    Attributes:
        sizes: Number of records per task for each split.
    """

    sizes: tuple[tuple[str, int], ...] = (("train", 2000), ("validation", 100), ("test", 200))

    def read(self, ref: DataRef, split: str) -> list[Record]:
        """Generate the records of a split.

        Raises:
            DataError: The task has no generator.
        """
        generators: dict[str, Callable[[random.Random], Item]] = {**GENERATORS, **WRITERS}
        if ref.file not in generators:
            raise DataError(f"{ref.file} is not generated; give --data a folder, or use a profile that has the hub.")
        rng = random.Random(f"{ref.file}/{split}")
        return [asdict(generators[ref.file](rng)) for _ in range(dict(self.sizes)[split])]

    def locate(self, ref: DataRef, split: str, number: int) -> str:
        """Return the task, split and number of a record."""
        return f"{ref.file}_{split}, record {number}"
