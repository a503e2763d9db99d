"""Which records stand in one table, and which of them make a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bench.experiments import Experiment
from bench.profiles import PROFILES
from bench.record import Record, RunConfig
from bench.run import BASE
from bench.stats import Mean, mean_over_seeds

TITLES = {"lora": "LoRA", "asylora": "AsyLoRA", "dora": "DoRA", "molora": "MoLoRA", "moasylora": "MoAsyLoRA",
          "malora": "MALoRA", "malora-small": "MALoRA-Small", BASE: "base, no adapter"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method at one rate, all its seeds."""

    method: str
    rate: float | None
    records: list[Record]  # status ok, by seed
    broken: list[Record]  # diverged or out of memory

    @property
    def title(self) -> str:
        return TITLES.get(self.method, self.method)

    @property
    def mean(self) -> Mean:
        return mean_over_seeds([record.items for record in self.records])

    def task_mean(self, task: str) -> float:
        return 100 * sum(record.test[task]["value"] for record in self.records) / len(self.records)


def comparable(
    records: list[Record], experiment: Experiment, like: RunConfig | None = None
) -> tuple[list[Record], int]:
    """The records of an experiment that agree in everything but method, rate and seed, and how many do not.

    Without `like`, a configuration that they must agree with, the largest such group of the folder; the latest of
    equals. A method that was run with different options counts with those that most of its records have.
    """
    mixtures = {experiment.mixture, *(p.mixtures.get(experiment.mixture) for p in PROFILES.values())}
    mine = [r for r in records if r.config.mixture in mixtures]
    groups: dict[tuple, list[Record]] = {}
    for record in mine:
        groups.setdefault(_setting(record.config), []).append(record)
    if like is not None:
        group = groups.get(_setting(like), [])
    else:
        group = max(groups.values(), key=lambda g: (len(g), max(r.provenance["time"] for r in g)), default=[])
    group = _commonest(group, lambda r: r.data["sha256"]["test"] if r.data else None)
    by_method = {method: [r for r in group if r.config.method == method] for method in {r.config.method for r in group}}
    group = [r for runs in by_method.values() for r in _commonest(runs, lambda r: repr(r.config.method_options))]
    group.sort(key=lambda r: r.config.id)
    return group, len(mine) - len(group)


def _commonest(records: list[Record], key: Callable[[Record], str | None]) -> list[Record]:
    """The records with the commonest key, or none."""
    keys = Counter(key(r) for r in records if key(r) is not None)
    commonest = max(sorted(keys), key=keys.get, default=None)
    return [r for r in records if key(r) in (None, commonest)]


def _setting(config: RunConfig) -> tuple:
    # The data's hash covers the training blend, which depends on the seed.
    return config.but("method", "method_options", "learning_rate", "seed", "data_hash")


def methods_of(experiment: Experiment, records: list[Record]) -> tuple[str, ...]:
    """The paper's methods in the paper's order, then whatever else was run."""
    others = {r.config.method for r in records} - {*experiment.methods, BASE}
    return (*experiment.methods, *sorted(others))


def rows(records: list[Record], methods: tuple[str, ...], rates: dict[str, float]) -> list[Row]:
    """A row a method, at the rate given for it."""
    found = []
    for method in methods:
        runs = sorted((r for r in records if r.config.method == method and r.config.learning_rate == rates.get(method)),
                      key=lambda r: r.config.seed)  # fmt: skip
        ok = [r for r in runs if r.status == "ok"]
        if runs:
            found.append(Row(method, rates.get(method), ok, [r for r in runs if r.status != "ok"]))
    return found
