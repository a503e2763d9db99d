"""TASKS and MIXTURES: the places to add a task or a mixture of tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tasks.arc import ARC_CHALLENGE, ARC_EASY
from tasks.base import DataRef, Domain, Question, Task
from tasks.boolq import BOOLQ
from tasks.domains import MAX_OPEN_ITEMS, OPEN, PAPER
from tasks.e2e import E2E
from tasks.gsm8k import GSM8K
from tasks.humaneval import HUMANEVAL
from tasks.medmcqa import MEDMCQA
from tasks.openbookqa import OPENBOOKQA
from tasks.phrasebank import PHRASEBANK
from tasks.piqa import PIQA
from tasks.procedural import GENERATORS
from tasks.procedural_inter import PROCEDURAL_WRITTEN

_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
PROCEDURAL = tuple(
    Task(name, name, lambda record: Question(**record), DataRef(name, hub=""), _SPLITS) for name in GENERATORS
)
_INTRA = (PIQA, OPENBOOKQA, BOOLQ, ARC_CHALLENGE, ARC_EASY)
_INTER = (MEDMCQA, HUMANEVAL, GSM8K, PHRASEBANK, ARC_CHALLENGE, ARC_EASY, E2E)
_PROCEDURAL_INTER = (*(task for task in PROCEDURAL if task.name in ("lexicon", "comparison")), *PROCEDURAL_WRITTEN)
_PROCEDURAL_DOMAINS = tuple(
    Domain(f"{task.name}_train", task.title, (task,), (task.name,)) for task in _PROCEDURAL_INTER
)

_ALL_TASKS: tuple[Task | Domain, ...] = (
    *(*_INTRA, *_INTER, *PROCEDURAL, *PROCEDURAL_WRITTEN),
    *(*PAPER, *_PROCEDURAL_DOMAINS),
)
TASKS: dict[str, Task | Domain] = {task.name: task for task in _ALL_TASKS}


@dataclass(frozen=True)
class Mixture:
    """Tasks that are trained together.

    Attributes:
        name: Name in commands and records. `MIXTURE/TASK` is a single task or domain of a mixture.
        tasks: Names in TASKS, in the order of the table's columns.
        blend: "size" takes every training item. "even" takes equally many items from each task or domain, as many as
            the smallest one has.
        domains: The domains to train on. If there are none, the tasks themselves are trained on.
        size: Maximum number of items per task or domain in an even blend.
        note: A remark on the training data for tables, or "".
    """

    name: str
    tasks: tuple[str, ...]
    blend: Literal["size", "even"] = "size"
    domains: tuple[Domain, ...] = ()
    size: int | None = None
    note: str = ""


_NOT_THE_PAPERS = (
    "Not the paper's training data. Of its six data sets only E2E NLG is used as published. Open data sets replace the "
    "others, which are not available here, or only in part."
)
_BLENDS = (
    Mixture("intra", tuple(task.name for task in _INTRA)),
    Mixture("procedural", tuple(task.name for task in PROCEDURAL), blend="even"),
    Mixture("inter", tuple(task.name for task in _INTER), "even", PAPER, size=30_000),
    Mixture("inter-open", tuple(task.name for task in _INTER), "even", OPEN, size=MAX_OPEN_ITEMS, note=_NOT_THE_PAPERS),
    Mixture("procedural-inter", tuple(task.name for task in _PROCEDURAL_INTER), "even", _PROCEDURAL_DOMAINS),
)


def _single_tasks_of(blend: Mixture) -> list[Mixture]:
    """Return a mixture for each domain, or else each task, of a blend.

    It is the paper's "ST".
    """
    if blend.domains:
        return [
            replace(blend, name=f"{blend.name}/{domain.name}", tasks=domain.tests, domains=(domain,))
            for domain in blend.domains
        ]
    return [replace(blend, name=f"{blend.name}/{task}", tasks=(task,)) for task in blend.tasks]


MIXTURES: dict[str, Mixture] = {
    mixture.name: mixture
    for mixture in (*_BLENDS, *(single for blend in _BLENDS for single in _single_tasks_of(blend)))
}
