"""Plan the runs of an experiment, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.experiments.methods import BASE
from bench.experiments.registry import Experiment, TableEntry, single_task_mixtures
from bench.records.schema import RunConfig
from bench.runs.setting import RunSettings, make_run_config

Runs = list[tuple[RunConfig, RunSettings]]


def rates_before_sweep(setting: RunSettings, tuning_groups: Sequence[str]) -> dict[str, float]:
    """Return learning rates that stand for those that a sweep has yet to choose.

    With them `plan_runs` plans as many runs as after the sweep. They are rates of the sweep, because its run may also
    be the table's run of the same seed, and they are not the paper's, which a table may run as well.
    """
    rate = next(rate for rate in setting.profile.rates if rate != setting.profile.paper_rate)
    return dict.fromkeys(tuning_groups, rate)


def plan_runs(
    setting: RunSettings,
    experiment: Experiment,
    entries: Sequence[TableEntry],
    seeds: int | None,
    tuned: dict[str, float],
) -> Iterator[Runs]:
    """Yield the runs of an experiment in lists.

    Each list needs the results of the lists before it.

    A table is one list. It begins with the base. Seeds are the outermost loop, so that an interrupted table compares
    all methods over equally many seeds.

    Args:
        setting: What the runs have in common.
        experiment: Table or figure to run.
        entries: Its rows to run.
        seeds: Runs per row; None for the row's own number or the profile's.
        tuned: Learning rate by tuning group. Other rows run at the paper's.
    """
    paper = setting.profile.paper_rate

    def seeds_of(entry: TableEntry) -> int:
        return seeds or entry.seeds or setting.profile.seeds

    by_seed: list[Runs] = [[]] if experiment.figure else [[(make_run_config(setting, BASE, 0), setting)]]
    for seed in range(max(map(seeds_of, entries))):
        for entry in entries:
            rates = {tuned.get(entry.tuning_group, paper)} | ({paper} if experiment.both_rates else set())
            if seed < seeds_of(entry):
                for rate in sorted(rates):
                    by_seed[-1] += _runs_of_row(setting, experiment, entry, seed, rate)
        by_seed.append([])
    yield from by_seed if experiment.figure else [[run for runs in by_seed for run in runs]]


def _runs_of_row(setting: RunSettings, experiment: Experiment, entry: TableEntry, seed: int, rate: float) -> Runs:
    """Return one run, or one for each single task of the mixture.

    Figure 2 compares experts that were trained on single tasks. The adapters of seed 0 are saved. Those of later seeds
    are compared with the saved adapter of the same task, "ST(S)", and with that of the next task, "ST(D)". The seeds
    must differ, because models of one seed start with the same A.
    """
    setting = replace(setting, method_options=entry.changes(setting.profile))
    if not entry.single_task:
        return [(make_run_config(setting, entry.method, seed, rate), setting)]
    settings = [replace(setting, mixture=part) for part in single_task_mixtures(setting.mixture_name)]
    configs = [make_run_config(s, entry.method, seed, rate) for s in settings]
    if experiment.figure:
        firsts = [make_run_config(s, entry.method, 0, rate) for s in settings]
        folders = [setting.results / "adapters" / config.id for config in firsts]
        following = folders[1:] + folders[:1]
        settings = [
            replace(s, save=same) if seed == 0 else replace(s, peers={"ST(S)": same, "ST(D)": other})
            for s, same, other in zip(settings, folders, following, strict=True)
        ]
    return list(zip(configs, settings, strict=True))
