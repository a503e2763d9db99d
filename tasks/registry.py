"""TASKS and MIXTURES: the places to add a task or a mixture of tasks.

Tasks and mixtures of files are added while the program runs, by `add_task` and `add_mixture`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tasks.arc import ARC_CHALLENGE, ARC_EASY
from tasks.base import DataRef, Domain, Question, Task
from tasks.boolq import BOOLQ
from tasks.classification import CLASSIFICATION, CLINC_DOMAINS
from tasks.domains import MAX_OPEN_ITEMS, OPEN, PAPER
from tasks.e2e import E2E
from tasks.errors import DataError, unknown_name
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
    *(*_INTRA, *_INTER, *CLASSIFICATION, *CLINC_DOMAINS.values(), *PROCEDURAL, *PROCEDURAL_WRITTEN),
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
        own_draw: Whether an even blend draws the items of a task by its name as well as the seed. A task then has the
            same items in every such mixture.
        compares_summed: Whether choices of the format cloze are compared by the likelihood of their whole text, not
            per character.
    """

    name: str
    tasks: tuple[str, ...]
    blend: Literal["size", "even"] = "size"
    domains: tuple[Domain, ...] = ()
    size: int | None = None
    note: str = ""
    own_draw: bool = False
    compares_summed: bool = False


_NOT_THE_PAPERS = (
    "Not the paper's training data. Of its six data sets only E2E NLG is used as published. Open data sets replace the "
    "others, which are not available here, or only in part."
)


def _of_classes(name: str, tasks: tuple[str, ...], size: int | None = None) -> Mixture:
    """Return a mixture of texts to classify."""
    return Mixture(name, tasks, "even", size=size, own_draw=True, compares_summed=True)


_BLENDS = (
    Mixture("intra", tuple(task.name for task in _INTRA), compares_summed=True),
    Mixture("procedural", tuple(task.name for task in PROCEDURAL), blend="even"),
    Mixture("inter", tuple(task.name for task in _INTER), "even", PAPER, size=30_000),
    Mixture("inter-open", tuple(task.name for task in _INTER), "even", OPEN, size=MAX_OPEN_ITEMS, note=_NOT_THE_PAPERS),
    _of_classes("classify", tuple(task.name for task in CLASSIFICATION), size=2000),
    _of_classes("procedural-classify", tuple(task.name for task in PROCEDURAL)),
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


_CLINC = _of_classes("clinc", tuple(task.name for task in CLINC_DOMAINS.values()), size=1000)
_ALL_MIXTURES = (
    *(*_BLENDS, _CLINC),
    *(single for blend in _BLENDS for single in _single_tasks_of(blend)),
    *(replace(_CLINC, name=f"clinc/{domain}", tasks=(task.name,)) for domain, task in CLINC_DOMAINS.items()),
)
MIXTURES: dict[str, Mixture] = {mixture.name: mixture for mixture in _ALL_MIXTURES}


def add_task(path: Path) -> str:
    """Read a task from a data file or a description, add it to TASKS, and return its name.

    It is also a mixture by itself, of the same name. Adding it again has no effect.

    Raises:
        DataError: A file is missing or broken, or another task or mixture has the name.
    """
    from tasks.task_files import read_task  # needs pydantic and PyYAML, which programs in the sandbox do not have

    task = read_task(path)
    known = TASKS.get(task.name)
    if isinstance(known, Task) and known.fingerprint == task.fingerprint != "":
        return task.name
    _require_free(task.name, path)
    assert task.source is not None, "read from its own files"
    task.load(task.source)  # so that a broken record is found before anything is written
    TASKS[task.name] = task
    MIXTURES[task.name] = Mixture(task.name, (task.name,))
    return task.name


def add_to_mixture(name: str, tasks: tuple[str, ...]) -> str:
    """Add a mixture of another one's tasks and of more, and return its name, as in "intra+mine".

    In a mixture of domains each added task is a domain as well.

    Args:
        name: Name in MIXTURES.
        tasks: Names in TASKS of the tasks to add.
    """
    mixture = MIXTURES[name]
    added = tuple(task for task in tasks if task not in mixture.tasks)
    extended = replace(mixture, name="+".join((name, *added)), tasks=(*mixture.tasks, *added))
    if mixture.domains:
        extended = replace(extended, domains=(*mixture.domains, *(_as_domain(task) for task in added)))
    MIXTURES.setdefault(extended.name, extended)
    return extended.name


def _as_domain(name: str) -> Domain:
    """Return a domain that trains on one task, and add it to TASKS, whose names validation scores have."""
    task = TASKS[name]
    assert isinstance(task, Task), "a domain is no task of a mixture"
    domain = Domain(f"{name}_train", task.title, (task,), (name,))
    TASKS.setdefault(domain.name, domain)
    return domain


def add_mixture(path: Path) -> str:
    """Read a mixture's description, add it and its tasks of files, and return its name.

    Raises:
        DataError: A file is missing or broken, a task is unknown, or another mixture has the name.
    """
    from tasks.task_files import is_file_name, read_mixture  # as above

    name, description = read_mixture(path)
    tasks = tuple(add_task(path.parent / task) if is_file_name(task) else task for task in description.tasks)
    if unknown := [task for task in tasks if not isinstance(TASKS.get(task), Task)]:
        known = [name for name, task in TASKS.items() if isinstance(task, Task)]
        raise DataError(f"{path}: {unknown_name('task', unknown[0], known)}, and files by their path.")
    if len(set(tasks)) < len(tasks):
        raise DataError(f"{path}: a task is named twice; name each once.")
    if description.size and description.blend == "size":
        raise DataError(f'{path}: size has no effect on blend = "size"; set blend = "even" or remove it.')
    mixture = Mixture(name, tasks, description.blend, size=description.size, note=description.note)
    if MIXTURES.get(name) == mixture:
        return name
    _require_free(name, path)
    for one in (mixture, *_single_tasks_of(mixture)):
        MIXTURES[one.name] = one
    return name


def _require_free(name: str, path: Path) -> None:
    if name in TASKS or name in MIXTURES:
        raise DataError(
            f"{path}: there is another task or mixture named {name!r}; set another name in a description, or rename "
            "the file."
        )
