"""Which records stand in one table, and which of them make a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bench.experiments.methods import BASE
from bench.experiments.registry import EXPERIMENTS, SWEEP_SEED, Experiment, TableEntry, parts, tuning_groups_of
from bench.records import schema
from bench.records.schema import Record, RunConfig
from bench.report.stats import Difference, Mean, Spread, compare, compare_apart, mean_over_seeds, spread_over_seeds
from tasks import MIXTURES


def records_that_lend_rates(records: list[schema.Record], like: schema.RunConfig) -> list[schema.Record]:
    """Those whose rates may count for runs like this one.

    Where tasks were never asked in the format of domains, they lend the rates that they were tuned to in another.
    """
    free = ("model_hash", "method", "method_options", "mixture", "learning_rate", "seed", "data_hash", "max_steps",
            "max_items", "epochs", "batch_size", "format")  # fmt: skip
    alike = [r for r in records if r.config.config_key_without(*free) == like.config_key_without(*free)]
    known = [r for r in alike if r.config.format == like.format]
    if MIXTURES[like.mixture].domains and all(MIXTURES[r.config.mixture].domains for r in known):
        known += [r for r in alike if not MIXTURES[r.config.mixture].domains]
    return known


def choose_rates(records: list[Record]) -> dict[str, float]:
    """By method, the rate with the best mean over validation tasks, of the sweep's seed.

    Of records on one mixture; those with other options than the paper's have no say.
    A method that was tried at one rate only has not been tuned and is left out. Ties go to the lower rate.
    """
    tried: dict[str, dict[float, float]] = {}
    for record in records:
        config = record.config
        if config.method != BASE and config.seed == SWEEP_SEED and TableEntry(config.method).matches(config):
            score = record.mean("validation") if record.status == "ok" else None
            tried.setdefault(config.method, {})[config.learning_rate] = float("-inf") if score is None else score
    return {
        method: min(scores, key=lambda rate: (-scores[rate], rate))
        for method, scores in tried.items()
        if len(scores) > 1
    }


@dataclass(frozen=True)
class TableRow:
    """A method with its options at one rate, all its seeds."""

    entry: TableEntry
    rate: float | None
    records: list[Record]  # status ok, by seed; those of a single-task row are joined from their parts
    broken: list[Record]  # diverged or out of memory
    sources: list[Record]  # every record that it rests on

    @property
    def method(self) -> str:
        return self.entry.method

    @property
    def title(self) -> str:
        return self.entry.title

    @property
    def mean(self) -> Mean:
        return mean_over_seeds([record.items for record in self.records])

    def task_mean(self, task: str) -> float:
        return 100 * sum(record.test[task].value for record in self.records) / len(self.records)


def select_comparable(
    records: list[Record], experiment: Experiment, like: RunConfig | None = None
) -> tuple[list[Record], int]:
    """The records of an experiment that agree in everything but row, rate and seed, and how many do not.

    Without `like`, a configuration that they must agree with, the largest such group of the folder; the latest of
    equals. Of a method with other options than the experiment's rows have, none count.
    """
    entries = [TableEntry(BASE), *entries_of(experiment, records)]
    of_suite = [r for r in records if _mixture(r.config, experiment)]
    groups: dict[tuple, list[Record]] = {}
    for record in of_suite:
        groups.setdefault(_setting(record.config, experiment), []).append(record)
    if like is not None:
        group = groups.get(_setting(like, experiment), [])
    else:
        group = max(groups.values(), key=lambda g: (len(g), max(r.provenance.time for r in g)), default=[])
    group = [r for r in _same_test(group) if any(experiment.has(entry, r.config) for entry in entries)]
    group.sort(key=lambda r: (r.config.mixture not in experiment.mixtures, r.config.id))  # parts last
    return group, len(of_suite) - len(group)


def _mixture(config: RunConfig, experiment: Experiment) -> str | None:
    """What a run was trained on: the experiment's mixture or one that stands for it, of which it may be a part."""
    if config.mixture in experiment.mixtures:
        return config.mixture
    whole = config.mixture.rpartition("/")[0]
    return whole if whole in experiment.mixtures and any(e.single_task for e in experiment.entries) else None


def _same_test(records: list[Record]) -> list[Record]:
    """Of each mixture the records with its commonest test, and those that know none."""
    tests: dict[str, Counter] = {}
    for record in records:
        if record.data:
            tests.setdefault(record.config.mixture, Counter())[record.data.sha256["test"]] += 1
    commonest = {mixture: max(sorted(counts), key=counts.get) for mixture, counts in tests.items()}
    return [r for r in records if not r.data or r.data.sha256["test"] == commonest[r.config.mixture]]


def _setting(config: RunConfig, experiment: Experiment) -> tuple:
    # The data's hash covers the training blend, which depends on the seed.
    free = ("method", "method_options", "learning_rate", "seed", "data_hash", "mixture")
    return _mixture(config, experiment), *config.config_key_without(*free)


def entries_of(experiment: Experiment, records: list[Record]) -> list[TableEntry]:
    """The paper's rows in the paper's order and, in Table 2, a row for every other method that was run."""
    if not experiment.both_rates:
        return list(experiment.entries)
    others = {r.config.method for r in records if r.config.mixture in experiment.mixtures}
    return [*experiment.entries, *(TableEntry(m, own_rate=True) for m in sorted(others - {*experiment.methods, BASE}))]


def tuned_rates(
    experiment: Experiment, records: list[Record], like: RunConfig | None = None
) -> tuple[dict[str, float], Experiment]:
    """Each family's own rate, and the experiment whose sweep chose it.

    That is this experiment if all families that ran on its mixture were swept there; else Table 2 lends its choice to
    all of them, for the same model and size.
    """
    own, _ = select_comparable(records, experiment, like)
    own = [r for r in own if r.config.mixture in experiment.mixtures]
    rates = choose_rates(own)
    rates_from = EXPERIMENTS["table2"]
    if experiment == rates_from or (rates and rates.keys() >= set(groups_with_runs(experiment, own))):
        return rates, experiment
    lent = choose_rates(select_comparable(records, rates_from)[0])
    return {
        tuning_group: lent[tuning_group] for tuning_group in experiment.tuning_groups if tuning_group in lent
    }, rates_from


def groups_with_runs(experiment: Experiment, records: list[Record]) -> list[str]:
    """The families of the rows that have runs."""
    return tuning_groups_of(e for e in experiment.entries if any(experiment.has(e, r.config) for r in records))


def rows(
    records: list[Record], entries: list[TableEntry], rates: dict[str, float], experiment: Experiment
) -> list[TableRow]:
    """A row an entry, at the rate given for its family."""
    found = []
    for entry in entries:
        runs = sorted(
            (
                r
                for r in records
                if experiment.has(entry, r.config) and r.config.learning_rate == rates.get(entry.tuning_group)
            ),
            key=lambda r: r.config.seed,
        )
        if runs:
            whole = _joined(runs) if entry.single_task else runs
            ok = [r for r in whole if r.status == "ok"]
            found.append(
                TableRow(entry, rates.get(entry.tuning_group), ok, [r for r in runs if r.status != "ok"], runs)
            )
    return found


def _joined(runs: list[Record]) -> list[Record]:
    """A record a seed whose parts are all there and whole, with the tests of all parts."""
    names = set(parts(runs[0].config.mixture.rpartition("/")[0]))
    joined = []
    for seed in sorted({r.config.seed for r in runs}):
        mine = [r for r in runs if r.config.seed == seed and r.status == "ok"]
        if {r.config.mixture for r in mine} == names:
            tests = {task: score for r in mine for task, score in r.test.items()}
            items = {task: outcomes for r in mine for task, outcomes in r.items.items()}
            joined.append(mine[0].replace(test=tests, items=items, data=None))
    return joined


def spread(table: Iterable[TableRow]) -> Spread | None:
    """How runs of a table vary from seed to seed, by its rows of several; a single-task row's parts vary otherwise."""
    return spread_over_seeds([r.items for r in row.records] for row in table if not row.entry.single_task)


def difference(first: TableRow, second: TableRow, runs_vary: Spread | None) -> Difference | None:
    """Second less first: paired over the seeds that both have, if there are two, else over all seeds of each.

    For the latter `runs_vary` says how runs vary. Where it does not, one common seed is compared, and without one there
    is None, as for a row without a run.
    """
    runs = [{r.config.seed: r.items for r in row.records} for row in (first, second)]
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if len(seeds) < 2 and runs_vary and all(runs):
        return compare_apart(*([*items.values()] for items in runs), runs_vary)
    return compare(*([items[seed] for seed in seeds] for items in runs)) if seeds else None
