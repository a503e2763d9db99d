"""EXPERIMENTS: each a list of runs and a way to lay them out. The one place to add one."""

from __future__ import annotations

from dataclasses import dataclass

from bench.record import Record, RunConfig
from bench.run import BASE, Setting, configure


@dataclass(frozen=True)
class Experiment:
    """A table of the paper: methods on a mixture, each at the paper's rate and at its own best one."""

    name: str
    title: str
    mixture: str
    methods: tuple[str, ...]


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment("table2", "Table 2: intra-domain", "intra", ("lora", "asylora", "dora", "molora", "malora")),
    )
}

SWEEP_SEED = 0


def sweep(setting: Setting, methods: list[str]) -> list[RunConfig]:
    """Every method at every rate of the profile, one seed."""
    return [configure(setting, method, SWEEP_SEED, rate) for method in methods for rate in setting.profile.rates]


def final(setting: Setting, methods: list[str], seeds: int, tuned: dict[str, float]) -> list[RunConfig]:
    """The base; every method at the paper's rate and, where one was tuned, at its own, for every seed."""
    configs = [configure(setting, BASE, 0)]
    for seed in range(seeds):  # outermost, so that what is there after an interruption compares all methods
        for method in methods:
            rates = {setting.profile.paper_rate, tuned.get(method, setting.profile.paper_rate)}
            configs += [configure(setting, method, seed, rate) for rate in sorted(rates)]
    return configs


def choose_rates(records: list[Record]) -> dict[str, float]:
    """By method, the rate with the best mean over validation tasks, of the sweep's seed.

    A method that was tried at one rate only has not been tuned and is left out. Ties go to the lower rate.
    """
    tried: dict[str, dict[float, float]] = {}
    for record in records:
        config = record.config
        if config.method != BASE and config.seed == SWEEP_SEED:
            score = record.mean("validation") if record.status == "ok" else None
            tried.setdefault(config.method, {})[config.learning_rate] = float("-inf") if score is None else score
    return {
        method: min(scores, key=lambda rate: (-scores[rate], rate))
        for method, scores in tried.items()
        if len(scores) > 1
    }
