"""Selection of the records that make a table, and of each row's learning rate.

Records become one pandas frame, a row per record; see `records_frame`. Every other function is a query on that frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import pandas as pd

from bench.experiments.floors import tasks_at_floor
from bench.experiments.methods import BASE, ELSEWHERE
from bench.experiments.profiles import PROFILES, TUNING_SEED, Profile
from bench.experiments.registry import (
    EXPERIMENTS,
    Experiment,
    TableEntry,
    single_task_mixtures,
    tuning_groups_of,
)
from bench.records.schema import Record, RunConfig
from bench.report.scores.balanced import with_balanced_accuracy
from bench.report.scores.comparable import same_scorer, same_test
from bench.report.scores.rates import choose_rates
from bench.report.stats import (
    Difference,
    Mean,
    Outcomes,
    Spread,
    compare,
    compare_apart,
    mean_over_seeds,
    spread_over_seeds,
)
from tasks import MIXTURES

Rates = Mapping[str, float | None]  # by tuning group
# Fields in which the rows and the seeds of one table differ. The data's hash covers the order of training, which
# depends on the seed. The scorer's versions depend on the tasks of the mixture; see `bench.report.scores.comparable`.
FREE_IN_A_TABLE = ("method", "method_options", "learning_rate", "seed", "data_hash", "mixture", "scorer_versions")
FREE_FOR_RATES = (*FREE_IN_A_TABLE, "model_hash", "max_steps", "max_items", "epochs", "batch_size", "format",
                  "warmup_ratio")  # fmt: skip
COLUMNS = (*RunConfig.model_fields, "setting", "variant", "id", "status", "validation", "test", "time", "test_hash",
           "record")  # fmt: skip


def records_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return a frame with a row per record.

    Its columns are the fields of RunConfig, and:
        setting: The configuration without the fields that differ within a table, as text.
        variant: The fields that decide which table entry a run belongs to, as text.
        id, status: As in the record.
        validation, test: Means over tasks in percent.
        time: When the run was made.
        test_hash: Hash of the test set; None if the run failed before it read the data.
        record: The record itself.
    """
    rows = [
        dict(record.config)
        | {
            "setting": _setting(record.config),
            "variant": _variant(record.config),
            "id": record.id,
            "status": record.status,
            "validation": record.mean("validation"),
            "test": record.mean("test"),
            "time": record.provenance.time,
            "test_hash": record.data.sha256["test"] if record.data else None,
            "record": record,
        }
        for record in records
    ]
    # Few dtypes keep filters fast: pandas copies each block of columns of one dtype by itself.
    frame = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    return frame.astype({"learning_rate": float, "validation": float, "test": float})


def records_of(frame: pd.DataFrame) -> list[Record]:
    """Return the records of a frame, in its order."""
    return list(frame["record"])


def _setting(config: RunConfig) -> str:
    return repr(config.config_key_without(*FREE_IN_A_TABLE))


def _variant(config: RunConfig) -> str:
    return repr((config.profile, config.mixture, config.method, config.method_options))


def _at_rate(frame: pd.DataFrame, rate: float | None) -> pd.DataFrame:
    rates = frame["learning_rate"]
    return frame[rates.isna() if rate is None else rates == rate]


def runs_of(frame: pd.DataFrame, experiment: Experiment, entry: TableEntry) -> pd.DataFrame:
    """Return the runs of a table entry, at any learning rate and seed."""
    return _of_entries(frame, experiment, [entry])


def _of_entries(frame: pd.DataFrame, experiment: Experiment, entries: Sequence[TableEntry]) -> pd.DataFrame:
    """Return the runs that belong to any of these table entries."""
    examples = frame.drop_duplicates("variant")
    belongs = {
        variant: any(experiment.has(entry, record.config) for entry in entries)
        for variant, record in zip(examples["variant"], examples["record"], strict=True)
    }
    return frame[frame["variant"].map(belongs).astype(bool)]


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of a table and their origin.

    Attributes:
        tuned: Rate by tuning group, chosen on validation. A group that was not tuned is missing.
        source: The experiment whose sweep chose them.
        formats: Prompt formats of that sweep's runs.
    """

    tuned: dict[str, float]
    source: Experiment
    formats: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TableRow:
    """All seeds of a method with its options at one learning rate.

    Attributes:
        records: Runs with status ok, by seed. A single-task row has one joined record per seed.
        broken: Runs that diverged or ran out of memory.
        sources: Every record that the row rests on.
        at_floor: Tasks that count neither in the mean nor in comparisons.
    """

    entry: TableEntry
    rate: float | None
    records: list[Record]
    broken: list[Record]
    sources: list[Record]
    at_floor: frozenset[str] = frozenset()

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.entry.method

    @property
    def title(self) -> str:
        """Title of the row in the paper's table."""
        return self.entry.title

    @property
    def outcomes(self) -> list[Outcomes]:
        """Outcomes of the test items of learned tasks, by seed."""
        return [self.outcomes_of(record) for record in self.records]

    def outcomes_of(self, record: Record) -> Outcomes:
        """Return the outcomes of a run's test items, without those of tasks at floor."""
        return {task: rights for task, rights in (record.items or {}).items() if task not in self.at_floor}

    @property
    def mean(self) -> Mean:
        """Mean over learned tasks and seeds, with its interval."""
        return mean_over_seeds(self.outcomes)

    @property
    def trainable(self) -> int | None:
        """Number of trainable parameters; None for the base model."""
        parameters = self.records[0].parameters
        return parameters.trainable if parameters else None

    def task_mean(self, task: str) -> float:
        """Return the mean over seeds of a task's score in percent."""
        return 100 * sum(record.test[task].value for record in self.records if record.test) / len(self.records)


@dataclass(frozen=True)
class Selection:
    """The comparable records of one experiment and profile, and their learning rates.

    Attributes:
        folder: All records of the profile.
        frame: The records that differ only in row, learning rate and seed.
        left_out: Number of records of the same mixture with other settings.
        rates: The tuned rates and their origin.
    """

    experiment: Experiment
    profile: str
    folder: pd.DataFrame
    frame: pd.DataFrame
    left_out: int
    rates: LearningRates

    @property
    def records(self) -> list[Record]:
        """The selected records; those of single tasks come last."""
        return records_of(self.frame)

    @property
    def size(self) -> Profile:
        """The profile's settings for this experiment."""
        return PROFILES[self.profile].on(self.experiment.mixture)

    @cached_property
    def at_floor(self) -> frozenset[str]:
        """The tasks that a LoRA trained on them alone does not learn; none if it learns no task."""
        found = _tasks_at_floor(self.folder, self.frame)
        return frozenset(found if any(set(record.test or {}) - found for record in self.records) else ())

    @property
    def entries(self) -> list[TableEntry]:
        """The rows of the table."""
        return entries_of(self.experiment, self.frame)

    @property
    def at_paper_rate(self) -> dict[str, float]:
        """The paper's learning rate for every tuning group that is trained here."""
        groups = [group for group in tuning_groups_of(self.entries) if not group.startswith(ELSEWHERE)]
        return dict.fromkeys(groups, self.size.paper_rate)

    @property
    def at_own_rate(self) -> dict[str, float]:
        """The learning rate of every tuning group.

        It is the tuned one, or the paper's where none was tuned.
        """
        return self.at_paper_rate | self.rates.tuned

    def rows(self, rates: Rates, entries: Sequence[TableEntry] | None = None) -> list[TableRow]:
        """Return a row per table entry that has runs at the rate of its tuning group."""
        found = []
        reported = self.frame[self.frame["seed"] != TUNING_SEED]
        for entry in self.entries if entries is None else entries:
            rate = rates.get(entry.tuning_group)
            runs = _at_rate(runs_of(reported, self.experiment, entry), rate).sort_values("seed", kind="stable")
            if len(runs):
                records = records_of(runs)
                complete = _joined(records) if entry.single_task else records
                ok = [record for record in complete if record.status == "ok"]
                broken = [record for record in records if record.status != "ok"]
                found.append(TableRow(entry, rate, ok, broken, records, self.at_floor))
        return found


def select(
    experiment: Experiment,
    profile: str,
    frame: pd.DataFrame,
    *,
    like: RunConfig | None = None,
    rates: LearningRates | None = None,
) -> Selection:
    """Select an experiment's records of one profile.

    Args:
        experiment: The table or figure.
        profile: Name of the profile.
        frame: All records of the profile.
        like: A configuration that the records must agree with; by default the one with most records.
        rates: Learning rates of the rows; by default those that these records' sweeps chose.
    """
    mine, left_out = select_comparable(frame, experiment, like)
    mine = with_balanced_accuracy(mine)
    return Selection(experiment, profile, frame, mine, left_out, rates or tuned_rates(experiment, frame))


def select_comparable(
    frame: pd.DataFrame, experiment: Experiment, like: RunConfig | None = None
) -> tuple[pd.DataFrame, int]:
    """Return the records that differ only in row, learning rate and seed.

    Without `like` they are the largest such group; of equal groups, the one with the latest record. Runs of a method
    with other options than the experiment's rows have are left out. The number of the other records is returned too.
    """
    entries = [TableEntry(BASE), *entries_of(experiment, frame)]
    suites = frame["mixture"].map(partial(_suite, experiment))
    of_suite = frame[suites.notna()]
    if like is not None:
        group = of_suite[
            (of_suite["setting"] == _setting(like)) & (suites[of_suite.index] == _suite(experiment, like.mixture))
        ]
    else:
        groups = [group for _, group in of_suite.groupby([suites[suites.notna()], "setting"], sort=False)]
        group = max(groups, key=lambda g: (len(g), g["time"].max()), default=of_suite)
    group = same_scorer(same_test(group), like)
    group = _of_entries(group, experiment, entries).sort_values("id")
    is_single_task = ~group["mixture"].isin(experiment.mixtures)
    return pd.concat([group[~is_single_task], group[is_single_task]]), len(of_suite) - len(group)


def _suite(experiment: Experiment, mixture: str) -> str | None:
    """Return the experiment's mixture that a run belongs to.

    It is the run's own mixture, or the one that it trains a single task of.
    """
    if mixture in experiment.mixtures:
        return mixture
    suite = mixture.rpartition("/")[0]
    return suite if suite in experiment.mixtures and any(e.single_task for e in experiment.entries) else None


def entries_of(experiment: Experiment, frame: pd.DataFrame) -> list[TableEntry]:
    """Return the paper's rows and, in Table 2, a row for every other method and every adapter from elsewhere."""
    if not experiment.both_rates:
        return list(experiment.entries)
    others = set(frame.loc[frame["mixture"].isin(experiment.mixtures), "method"]) - {*experiment.methods, BASE}
    return [*experiment.entries, *(TableEntry(method, own_rate=True) for method in sorted(others))]


def records_that_lend_rates(frame: pd.DataFrame, like: RunConfig) -> pd.DataFrame:
    """Return the records whose tuned rates apply to runs like this one.

    Sweeps in the same prompt format count. Where no single-domain task was ever asked in that format, sweeps of
    single-domain mixtures in another format count too.
    """
    expected = like.config_key_without(*FREE_FOR_RATES)
    agree = frame["record"].map(lambda record: record.config.config_key_without(*FREE_FOR_RATES) == expected)
    same = frame[agree.astype(bool)]
    known = same["mixture"].isin(list(MIXTURES))  # runs on tasks of files may have been recorded here as well
    same = same[known.astype(bool)]
    of_domains = same["mixture"].map(lambda name: bool(MIXTURES[name].domains)).astype(bool)
    same_format = same["format"] == like.format
    if MIXTURES[like.mixture].domains and of_domains[same_format].all():
        return pd.concat([same[same_format], same[~of_domains]])
    return same[same_format]


def tuned_rates(experiment: Experiment, frame: pd.DataFrame) -> LearningRates:
    """Return each tuning group's learning rate.

    The experiment's own sweeps count if they tuned every group that ran on its mixture. Otherwise all groups take the
    choice of Table 2's sweeps, for the same model and size, so that no row is tuned better than another.
    """
    own, _ = select_comparable(frame, experiment)
    own = own[own["mixture"].isin(experiment.mixtures)]
    rates = choose_rates(own, _tasks_at_floor(frame, own))
    table2 = EXPERIMENTS["table2"]
    if experiment == table2 or (rates and rates.keys() >= set(groups_with_runs(experiment, own))):
        return LearningRates(rates, experiment, frozenset(own["format"]))
    lent, _ = select_comparable(frame, table2)
    rates = choose_rates(lent, _tasks_at_floor(frame, lent))
    rates = {group: rates[group] for group in experiment.tuning_groups if group in rates}
    return LearningRates(rates, table2, frozenset(lent["format"]))


def _tasks_at_floor(folder: pd.DataFrame, of_mixture: pd.DataFrame) -> set[str]:
    return tasks_at_floor(folder["record"], of_mixture["record"].iloc[0].config) if len(of_mixture) else set()


def groups_with_runs(experiment: Experiment, frame: pd.DataFrame) -> list[str]:
    """Return the tuning groups of the rows that have runs."""
    return tuning_groups_of(entry for entry in experiment.entries if len(runs_of(frame, experiment, entry)))


def _joined(runs: list[Record]) -> list[Record]:
    """Return a record per seed with the tests of all single tasks.

    Only the seeds that have every task's run get one.
    """
    names = set(single_task_mixtures(runs[0].config.mixture.rpartition("/")[0]))
    joined = []
    for seed in sorted({run.config.seed for run in runs}):
        mine = [run for run in runs if run.config.seed == seed and run.status == "ok"]
        if {run.config.mixture for run in mine} == names:
            tests = {task: score for run in mine for task, score in (run.test or {}).items()}
            items = {task: outcomes for run in mine for task, outcomes in (run.items or {}).items()}
            gold = {task: answers for run in mine for task, answers in (run.gold or {}).items()}
            has_all = gold.keys() == items.keys()  # older records have no losses
            joined.append(mine[0].replace(test=tests, items=items, gold=gold if has_all else None, data=None))
    return joined


def mixture_rows(selection: Selection, rates: Rates) -> list[TableRow]:
    """Return the rows of all tables of this mixture, each once.

    They differ from the selection's runs only in method, options, learning rate and seed. How runs vary is estimated
    from them, so that two tables with the same runs use the same estimate.

    Args:
        selection: The records of one table.
        rates: Learning rate by tuning group. Groups without one have their own rate.
    """
    found = {_key(row): row for row in selection.rows(rates)}
    if selection.frame.empty:
        return []
    like = selection.records[0].config
    for experiment in EXPERIMENTS.values():
        if experiment.mixture == selection.experiment.mixture and experiment != selection.experiment:
            other = select(experiment, selection.profile, selection.folder, like=like)
            rows = other.rows({**other.at_own_rate, **rates})
            found = {_key(row): row for row in rows if not row.entry.single_task} | found
    return list(found.values())


def _key(row: TableRow) -> tuple[object, ...]:
    return row.method, repr(sorted(row.sources[0].config.method_options.items())), row.rate, row.entry.single_task


def spread(table: Iterable[TableRow]) -> Spread | None:
    """Return the variance between seeds, pooled over the rows with several.

    Single-task rows do not count: their means are over separate runs.
    """
    return spread_over_seeds(row.outcomes for row in table if not row.entry.single_task)


def difference(first: TableRow, second: TableRow, between_seeds: Spread | None) -> Difference | None:
    """Return the second row's mean less the first's, or None if a row has no runs.

    With two or more seeds in common the test is paired over them. With fewer, all seeds of both rows are compared, with
    the variance between seeds given. Without that variance the one common seed is compared.
    """
    runs = [{record.config.seed: row.outcomes_of(record) for record in row.records} for row in (first, second)]
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if len(seeds) < 2 and between_seeds and all(runs):
        return compare_apart(list(runs[0].values()), list(runs[1].values()), between_seeds)
    return compare(*([items[seed] for seed in seeds] for items in runs)) if seeds else None
