"""Build the examples of a mixture: read, remove duplicates, blend and format."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import astuple, dataclass

from tasks.base import FORMATS, Example, Exercise, Item, Source, Task, written
from tasks.errors import DataError
from tasks.registry import TASKS, Mixture


@dataclass(frozen=True)
class MixtureData:
    """The examples of a mixture.

    Attributes:
        train: Training examples of all tasks, in file order. The trainer shuffles them.
        validation: Validation examples by task or domain.
        test: Test examples by task.
        dropped: Number of training items dropped per task because the validation or test split of any task of the
            mixture has the same question.
        dropped_validation: Number of validation items dropped per task because a test split has the same question.
        sha256: Hash of every example by split, and the fingerprint of each task that has its own files. Runs with equal
            hashes had the same data.
    """

    train: list[Example]
    validation: dict[str, list[Example]]
    test: dict[str, list[Example]]
    dropped: dict[str, int]
    dropped_validation: dict[str, int]
    sha256: dict[str, str]


def build(mixture: Mixture, source: Source, *, format: str, seed: int) -> MixtureData:
    """Read, clean, blend and format a mixture.

    Args:
        mixture: The mixture, usually from MIXTURES.
        source: Reader of the published records.
        format: Name of the prompt format for questions with choices, one of FORMATS.
        seed: Seed of an even blend. Validation and test do not depend on it.

    Raises:
        DataError: A file is missing or broken, a task has no test item, or no training item of a task is left.
    """
    splits = _load(mixture, source)
    test = _select("test", splits)
    for name in mixture.tasks:
        if not test.get(name):
            raise DataError(f"{name} of {mixture.name} has no test item, so nothing can be scored; mend the file.")
    test_keys = _keys(test)
    validation, dropped_validation = _drop(test_keys, _select("validation", splits))
    train, dropped = _drop(test_keys | _keys(validation), _select("train", splits))
    for name, count in dropped.items():
        if count and not train[name]:
            raise DataError(
                f"all {count} training items of {name} ask the same as a test or validation item of {mixture.name}; "
                "questions that differ in punctuation only are the same."
            )
    if mixture.blend == "even":
        train = _blend_evenly(train, mixture, seed)

    train_examples = [example for name, items in train.items() for example in _format_items(name, items, format)]
    validation_examples = {name: _format_items(name, items, format) for name, items in validation.items()}
    test_examples = {name: _format_items(name, items, format) for name, items in test.items()}
    sha256 = {
        "train": _hash(train_examples),
        "validation": _hash(*validation_examples.values()),
        "test": _hash(*test_examples.values()),
    }
    for name in mixture.tasks:
        if fingerprint := getattr(TASKS[name], "fingerprint", ""):
            sha256[f"task {name}"] = fingerprint
    return MixtureData(train_examples, validation_examples, test_examples, dropped, dropped_validation, sha256)


def build_task(task: Task, source: Source, *, format: str) -> dict[str, list[Example]]:
    """Read, clean and format one task by itself.

    Args:
        task: The task.
        source: Reader of the published records.
        format: Name of the prompt format for questions with choices, one of FORMATS.

    Returns:
        Examples by split. A task that only tests has no other split than test.

    Raises:
        DataError: A file is missing or broken.
    """
    if "train" not in task.published:
        return {"test": _format_items(task.name, task.read(source, "test"), format)}
    data = build(Mixture(task.name, (task.name,)), source, format=format, seed=0)
    return {"train": data.train, "validation": data.validation[task.name], "test": data.test[task.name]}


def _load(mixture: Mixture, source: Source) -> dict[str, dict[str, list[Item]]]:
    """Return the items by task or domain, then by split."""
    if not mixture.domains:
        return {name: TASKS[name].load(source) for name in mixture.tasks}
    loaded = {domain.name: domain.load(source) for domain in mixture.domains}
    for name in mixture.tasks:
        task = TASKS[name]
        assert isinstance(task, Task), f"{mixture.name} is tested on {name}, which is a domain without a test split"
        loaded[name] = {"test": task.read(source, "test")}
    return loaded


def _select(split: str, loaded: dict[str, dict[str, list[Item]]]) -> dict[str, list[Item]]:
    return {name: splits[split] for name, splits in loaded.items() if split in splits}


def _keys(items: dict[str, list[Item]]) -> set[str]:
    return {item.key for of_task in items.values() for item in of_task}


def _drop(keys: set[str], items: dict[str, list[Item]]) -> tuple[dict[str, list[Item]], dict[str, int]]:
    """Drop the items with these keys.

    The remaining items and the number dropped are returned, both by task.
    """
    kept = {name: [item for item in of_task if item.key not in keys] for name, of_task in items.items()}
    return kept, {name: len(of_task) - len(kept[name]) for name, of_task in items.items()}


def _blend_evenly(items: dict[str, list[Item]], mixture: Mixture, seed: int) -> dict[str, list[Item]]:
    """Sample the same number of items from each task or domain, and keep their order."""
    size = min(map(len, items.values()))
    if mixture.size:
        size = min(size, mixture.size)
    rng = random.Random(seed)
    blended = {}
    for name, of_task in items.items():
        if mixture.domains or mixture.own_draw:
            rng = random.Random(f"{seed}/{name}")  # alone it draws the same items as it does in a blend
        blended[name] = [of_task[i] for i in sorted(rng.sample(range(len(of_task)), size))]
    return blended


def _format_items(task: str, items: list[Item], format: str) -> list[Example]:
    return [written(task, item) if isinstance(item, Exercise) else FORMATS[format](task, item) for item in items]


def _hash(*groups: list[Example]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        for example in group:
            digest.update(json.dumps(astuple(example)).encode())
    return digest.hexdigest()
