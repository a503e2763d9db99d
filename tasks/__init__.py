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
import sys
from dataclasses import astuple, dataclass, replace
from typing import Literal

from tasks.arc import ARC_CHALLENGE, ARC_EASY
from tasks.base import (
    FORMATS,
    DataRef,
    Domain,
    Example,
    Exercise,
    Item,
    Question,
    Source,
    Task,
    WrittenExample,
    written,
)
from tasks.boolq import BOOLQ
from tasks.domains import OPEN, OPEN_SIZE, PAPER
from tasks.e2e import E2E
from tasks.errors import DataError, UserError
from tasks.gsm8k import GSM8K
from tasks.humaneval import HUMANEVAL
from tasks.medmcqa import MEDMCQA
from tasks.openbookqa import OPENBOOKQA
from tasks.phrasebank import PHRASEBANK
from tasks.piqa import PIQA
from tasks.procedural import GENERATORS
from tasks.procedural_inter import PROCEDURAL_WRITTEN
from tasks.sources import Folder, Generator, Hub

_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
PROCEDURAL = tuple(
    Task(name, name, lambda record: Question(**record), DataRef(name, hub=""), _SPLITS) for name in GENERATORS
)
_INTRA = (PIQA, OPENBOOKQA, BOOLQ, ARC_CHALLENGE, ARC_EASY)
_INTER = (MEDMCQA, HUMANEVAL, GSM8K, PHRASEBANK, ARC_CHALLENGE, ARC_EASY, E2E)
_PROCEDURAL_INTER = (*(task for task in PROCEDURAL if task.name in ("lexicon", "comparison")), *PROCEDURAL_WRITTEN)
_PROCEDURAL_DOMAINS = tuple(Domain(f"{t.name}_train", t.title, (t,), (t.name,)) for t in _PROCEDURAL_INTER)

TASKS: dict[str, Task | Domain] = {
    task.name: task for task in (*_INTRA, *_INTER, *PROCEDURAL, *PROCEDURAL_WRITTEN, *PAPER, *_PROCEDURAL_DOMAINS)
}


@dataclass(frozen=True)
class Mixture:
    """Tasks that are trained together.

    Attributes:
        name: as in commands and records; `WHOLE/PART` is one task or domain of a mixture by itself.
        tasks: names in TASKS, in the order of the table's columns.
        blend: "size" takes every training item; "even" as many of each task or domain as its smallest has.
        domains: what is trained, where it is not the tasks; these are then asked only.
        size: with an even blend, the most of each.
        note: what a table must say of the training data, or "".
    """

    name: str
    tasks: tuple[str, ...]
    blend: Literal["size", "even"] = "size"
    domains: tuple[Domain, ...] = ()
    size: int | None = None
    note: str = ""


_NOT_THE_PAPERS = (
    "Not the paper's training data: of its six sets E2E NLG alone is here as published; open data stand in for the "
    "others, which are not here or in small part only."
)
_MIXED = (
    Mixture("intra", tuple(task.name for task in _INTRA)),
    Mixture("procedural", tuple(task.name for task in PROCEDURAL), blend="even"),
    Mixture("inter", tuple(task.name for task in _INTER), "even", PAPER, size=30_000),
    Mixture("inter-open", tuple(task.name for task in _INTER), "even", OPEN, size=OPEN_SIZE, note=_NOT_THE_PAPERS),
    Mixture("procedural-inter", tuple(task.name for task in _PROCEDURAL_INTER), "even", _PROCEDURAL_DOMAINS),
)
# Beside each mixture, every one of its domains or tasks alone (the paper's "ST"), asked what it teaches.
_SINGLE = tuple(
    replace(mixture, name=f"{mixture.name}/{name}", tasks=tests, domains=domains)
    for mixture in _MIXED
    for name, tests, domains in (
        [(domain.name, domain.tests, (domain,)) for domain in mixture.domains]
        or [(task, (task,), ()) for task in mixture.tasks]
    )
)
MIXTURES: dict[str, Mixture] = {mixture.name: mixture for mixture in (*_MIXED, *_SINGLE)}


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
    if mixture.domains:
        loaded = {domain.name: domain.load(source) for domain in mixture.domains}
        loaded |= {name: {"test": TASKS[name].read(source, "test")} for name in mixture.tasks}
    else:
        loaded = {name: TASKS[name].load(source) for name in mixture.tasks}

    def split(ours: str) -> dict[str, list[Item]]:
        return {name: splits[ours] for name, splits in loaded.items() if ours in splits}

    tests = {question.key for questions in split("test").values() for question in questions}
    validation, dropped_validation = _without(tests, split("validation"))
    held = tests | {question.key for questions in validation.values() for question in questions}
    clean, dropped = _without(held, split("train"))
    if mixture.blend == "even":
        size = min(*map(len, clean.values()), mixture.size or sys.maxsize)
        rng = random.Random(seed)
        for name, questions in clean.items():
            if mixture.domains:
                rng = random.Random(f"{seed}/{name}")  # so that a domain alone draws as it does in a blend
            clean[name] = [questions[i] for i in sorted(rng.sample(range(len(questions)), size))]

    def examples(name: str, questions: list[Item]) -> list[Example]:
        return [written(name, q) if isinstance(q, Exercise) else FORMATS[format](name, q) for q in questions]

    train = [example for name, questions in clean.items() for example in examples(name, questions)]
    shown = {name: examples(name, questions) for name, questions in validation.items()}
    test = {name: examples(name, questions) for name, questions in split("test").items()}
    sha256 = {"train": _hash(train), "validation": _hash(*shown.values()), "test": _hash(*test.values())}
    return MixtureData(train, shown, test, dropped, dropped_validation, sha256)


def _without(keys: set[str], questions: dict[str, list[Item]]) -> tuple[dict[str, list[Item]], dict[str, int]]:
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
    "UserError",
    "WrittenExample",
    "build",
]
