"""What is learned and asked. TASKS is the one place to add a task, MIXTURES the one to add a mixture of them.

A mixture is built from a source of records, a prompt format and a seed:

    data = build(MIXTURES["intra"], Folder(Path("data")), format="letters", seed=0)
    data.train          # examples of all tasks, blended
    data.test["piqa"]   # the examples that are scored
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import astuple, dataclass
from typing import Literal

from tasks.arc import ARC_CHALLENGE, ARC_EASY
from tasks.base import FORMATS, DataError, DataRef, Example, Question, Source, Task
from tasks.boolq import BOOLQ
from tasks.openbookqa import OPENBOOKQA
from tasks.piqa import PIQA
from tasks.procedural import GENERATORS
from tasks.sources import Folder, Generator, Hub

_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
PROCEDURAL = tuple(
    Task(name, name, lambda record: Question(**record), DataRef(name, hub=""), _SPLITS) for name in GENERATORS
)

TASKS: dict[str, Task] = {task.name: task for task in (PIQA, OPENBOOKQA, BOOLQ, ARC_CHALLENGE, ARC_EASY, *PROCEDURAL)}


@dataclass(frozen=True)
class Mixture:
    """Tasks that are trained together.

    Attributes:
        name: as in commands and records; `WHOLE/TASK` is one task of a mixture by itself.
        tasks: names in TASKS, in the order of the table's columns.
        blend: "size" takes every training question; "even" as many of each task as its smallest has.
    """

    name: str
    tasks: tuple[str, ...]
    blend: Literal["size", "even"] = "size"


MIXTURES: dict[str, Mixture] = {
    mixture.name: mixture
    for mixture in (
        Mixture("intra", ("piqa", "openbookqa", "boolq", "arc_challenge", "arc_easy")),
        Mixture("procedural", tuple(task.name for task in PROCEDURAL), blend="even"),
        Mixture("procedural-inter", tuple(task.name for task in PROCEDURAL[2:4]), blend="even"),
    )
}
MIXTURES |= {f"{m.name}/{task}": Mixture(f"{m.name}/{task}", (task,)) for m in [*MIXTURES.values()] for task in m.tasks}


@dataclass(frozen=True)
class MixtureData:
    """A mixture's examples.

    Attributes:
        train: of all tasks, in file order; the trainer shuffles.
        validation, test: by task.
        dropped: by task, how many training questions were left out because they stand in a validation or test set
            of the mixture.
        dropped_validation: the same of validation questions that stand in a test set.
        sha256: of every example, by split; two runs with the same hashes were trained and asked the same.
    """

    train: list[Example]
    validation: dict[str, list[Example]]
    test: dict[str, list[Example]]
    dropped: dict[str, int]
    dropped_validation: dict[str, int]
    sha256: dict[str, str]


def build(mixture: Mixture, source: Source, *, format: str, seed: int) -> MixtureData:
    """Read, clean, blend and format a mixture.

    Only the blend depends on `seed`; validation and test are the same for all.

    Raises:
        DataError: a file is missing or broken.
    """
    loaded = {name: TASKS[name].load(source) for name in mixture.tasks}
    tests = {question.key for splits in loaded.values() for question in splits["test"]}
    validation, dropped_validation = _without(tests, {name: splits["validation"] for name, splits in loaded.items()})
    held = tests | {question.key for questions in validation.values() for question in questions}
    clean, dropped = _without(held, {name: splits["train"] for name, splits in loaded.items()})
    if mixture.blend == "even":
        size = min(map(len, clean.values()))
        rng = random.Random(seed)
        clean = {
            name: [questions[i] for i in sorted(rng.sample(range(len(questions)), size))]
            for name, questions in clean.items()
        }

    def examples(name: str, questions: list[Question]) -> list[Example]:
        return [FORMATS[format](name, question) for question in questions]

    train = [example for name, questions in clean.items() for example in examples(name, questions)]
    shown = {name: examples(name, questions) for name, questions in validation.items()}
    test = {name: examples(name, splits["test"]) for name, splits in loaded.items()}
    sha256 = {"train": _hash(train), "validation": _hash(*shown.values()), "test": _hash(*test.values())}
    return MixtureData(train, shown, test, dropped, dropped_validation, sha256)


def _without(keys: set[str], questions: dict[str, list[Question]]) -> tuple[dict[str, list[Question]], dict[str, int]]:
    """The questions by task that are not among the keys, and how many were."""
    kept = {name: [q for q in items if q.key not in keys] for name, items in questions.items()}
    return kept, {name: len(items) - len(kept[name]) for name, items in questions.items()}


def _hash(*parts: list[Example]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            digest.update(json.dumps(astuple(example)).encode())
    return digest.hexdigest()


__all__ = [
    "FORMATS",
    "MIXTURES",
    "TASKS",
    "DataError",
    "Example",
    "Folder",
    "Generator",
    "Hub",
    "Mixture",
    "MixtureData",
    "Question",
    "Source",
    "Task",
    "build",
]
