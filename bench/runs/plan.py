"""Which runs an experiment needs, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.experiments.methods import BASE
from bench.experiments.registry import SWEEP_SEED, Experiment, TableEntry, parts
from bench.records.schema import RunConfig
from bench.runs.setting import RunSettings, make_run_config

Runs = list[tuple[RunConfig, RunSettings]]


def sweep(setting: RunSettings, tuning_groups: list[str]) -> Runs:
    """Every family at every rate of the profile, one seed."""
    rates = setting.profile.rates
    return [(make_run_config(setting, method, SWEEP_SEED, rate), setting) for method in tuning_groups for rate in rates]


def plan_runs(
    setting: RunSettings, experiment: Experiment, entries: list[TableEntry], seeds: int | None, tuned: dict[str, float]
) -> Iterator[Runs]:
    """The base, and every row at its family's rate, the paper's where none was tuned or both are run, for every seed.

    In lists of which each needs what the ones before it leave; a table is one. Seeds are outermost, so that what is
    there after an interruption compares all methods.
    """
    paper = setting.profile.paper_rate
    usual = setting.profile.seeds
    by_seed: list[Runs] = [[]] if experiment.figure else [[(make_run_config(setting, BASE, 0), setting)]]
    for seed in range(max(seeds or entry.seeds or usual for entry in entries)):
        for entry in entries:
            rates = {tuned.get(entry.tuning_group, paper)} | ({paper} if experiment.both_rates else set())
            if seed < (seeds or entry.seeds or usual):
                for rate in sorted(rates):
                    by_seed[-1] += _of_row(setting, experiment, entry, seed, rate)
        by_seed.append([])
    yield from by_seed if experiment.figure else [[run for runs in by_seed for run in runs]]


def _of_row(setting: RunSettings, experiment: Experiment, entry: TableEntry, seed: int, rate: float) -> Runs:
    """One run, or one for each part of the mixture.

    Figure 2 compares single-task experts: the first seed's are kept as adapters, and later ones compared with those of
    the same task, ST(S), and of the next one, ST(D). Models of one seed would start with the same A.
    """
    setting = replace(setting, method_options=entry.changes(setting.profile))
    if not entry.single_task:
        return [(make_run_config(setting, entry.method, seed, rate), setting)]
    settings = [replace(setting, mixture=part) for part in parts(setting.mixture_name)]
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
