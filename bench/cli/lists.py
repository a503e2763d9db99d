"""The command `list`: methods, tasks, mixtures and experiments, each with a line."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from tabulate import tabulate

import malora
from bench.experiments.methods import TITLES
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import EXPERIMENTS
from bench.records import store
from bench.records.schema import Record
from bench.report.claims import LLAMA2_7B
from malora.analysis.parameters import count_trainable
from tasks import MIXTURES, TASKS
from tasks.base import Domain, Task

MAX_CELL_WIDTH = 60  # characters; longer cells of the table are wrapped
LAYERS_7B = 32  # decoder layers of LLaMA-2 7B


def print_list(options: argparse.Namespace) -> int:
    """Print a list as a table, or as JSON."""
    rows = LISTS[options.what]()
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        head = [name.replace("_", " ") for name in rows[0]]
        align = ["right" if any(isinstance(row[name], int) for row in rows) else "left" for name in rows[0]]
        body = [[_text(value) for value in row.values()] for row in rows]
        print(tabulate(body, head, disable_numparse=True, colalign=align))
    return 0


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return textwrap.fill(", ".join(value) if isinstance(value, list) else value, MAX_CELL_WIDTH)


def _methods() -> list[dict[str, Any]]:
    """Describe the methods, with the sizes of their defaults."""
    rows = []
    for name in malora.METHODS:
        config = malora.make_config(name)
        trainable = LAYERS_7B * sum(count_trainable(config, *sizes) for sizes in LLAMA2_7B.values())
        rows.append({
            "name": name,
            "title": TITLES.get(name, name),
            "update_of_a_layer": _update(config),
            "rank": config.r,
            "trainable_at_7b": trainable,
        })  # fmt: skip
    return rows


def _update(config: LoraConfig | malora.MaloraConfig) -> str:
    """Describe the update of a layer in the paper's symbols."""
    if isinstance(config, LoraConfig):
        return "B A" + (" with separate magnitude and direction" if config.use_dora else "") + " (PEFT's own)"
    factors = f"{config.up} {config.down}"
    text = f"Σ g_t {factors}, {config.num_experts} experts, top {config.top_k}" if config.has_router else "B A"
    shared = f", d={config.d}" if config.d else ""
    frozen = f", {' and '.join(config.freeze)} frozen" if config.freeze else ""
    return text + shared + frozen + (", all A_t start equal" if config.same_start else "")


def _tasks() -> list[dict[str, Any]]:
    """Describe the tasks and the domains, with their sizes in the published records."""
    training: Counter[str] = Counter()
    test: Counter[str] = Counter()
    for record in _published_records():
        training |= Counter(_training_examples(record))
        test |= Counter({name: score.n for name, score in (record.test or {}).items()})
    return [
        {
            "name": name,
            "title": task.title,
            "kind": _kind(task),
            "training_examples": training.get(name),
            "test_items": test.get(name),
            "data": _data(task),
        }
        for name, task in TASKS.items()
    ]


def _kind(task: Task | Domain) -> str:
    if isinstance(task, Domain):
        return "domain to train on"
    return f"written answer, {task.writing.metric}" if task.writing else "choices"


def _data(task: Task | Domain) -> list[str]:
    """Return the ids of the data sets on the hub, or the names of their files."""
    parts = task.training_sets if isinstance(task, Domain) else (task,)
    return [part.data.hub or part.data.file for part in parts]


def _mixtures() -> list[dict[str, Any]]:
    """Describe the mixtures, with their sizes in the published records."""
    training: Counter[str] = Counter()
    for record in _published_records():
        training |= Counter({record.config.mixture: sum(_training_examples(record).values())})
    return [
        {
            "name": name,
            "trains_on": [domain.name for domain in mixture.domains] or list(mixture.tasks),
            "tests": list(mixture.tasks),
            "blend": mixture.blend,
            "training_examples": training.get(name),
        }
        for name, mixture in MIXTURES.items()
    ]


def _experiments() -> list[dict[str, Any]]:
    """Describe the experiments, with the numbers of their rows."""
    return [
        {
            "name": name,
            "title": experiment.title,
            "mixture": experiment.mixture,
            "rows": len(experiment.entries),
            "methods": list(experiment.methods),
        }
        for name, experiment in EXPERIMENTS.items()
    ]


LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "methods": _methods,
    "tasks": _tasks,
    "mixtures": _mixtures,
    "experiments": _experiments,
}


def _published_records() -> list[Record]:
    return [record for profile in PROFILES for record in store.read_all(store.RESULTS / profile)]


def _training_examples(record: Record) -> dict[str, int]:
    """Return the examples per epoch by task."""
    by_task = record.data.train if record.data else None
    return {name: task.examples for name, task in (by_task or {}).items()}
