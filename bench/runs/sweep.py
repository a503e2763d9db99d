"""Search for a method's learning rate, and single-task runs that find tasks at floor.

A search begins with a few rates. It goes on with the rates next to the best one until both have been run, so that the
optimum lies between two rates that are equally close to it. The rule is that of docs/notes/protocol-2026-12-01.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from bench.experiments.floors import FLOOR_METHOD, FLOOR_RATES, floors
from bench.experiments.methods import BASE
from bench.experiments.profiles import TUNING_SEED
from bench.experiments.registry import single_task_mixtures
from bench.records.schema import Record
from bench.runs.plan import Runs
from bench.runs.setting import RunSettings, make_run_config

MAX_RATES = 7  # per method


def next_rates(losses: Mapping[float, float], rates: Sequence[float], first: Sequence[float]) -> list[float]:
    """Return the learning rates to try next, in ascending order; none if the search has ended.

    Args:
        losses: Validation loss by rate that was tried; infinite for a run that diverged.
        rates: All rates, ascending.
        first: The rates to begin with.
    """
    if missing := [rate for rate in first if rate not in losses]:
        return missing
    # With infinite losses only, the lowest rate is taken: then lower ones are tried.
    best = rates.index(min(sorted(losses), key=losses.__getitem__))
    nearby = [best - 1] if math.isinf(losses[rates[best]]) else [best - 1, best + 1]
    missing = [rates[place] for place in nearby if 0 <= place < len(rates) and rates[place] not in losses]
    return missing[: max(0, MAX_RATES - len(losses))]


def sweep_round(
    setting: RunSettings, tuning_groups: Sequence[str], made: Sequence[Record], at_floor: Collection[str] = ()
) -> Runs:
    """Return the next runs of all methods' sweeps; none if they have ended.

    A profile without first rates tries all its rates in one round.

    Args:
        setting: What the runs have in common.
        tuning_groups: The methods.
        made: Records of the sweeps so far.
        at_floor: Tasks whose loss does not count.
    """
    profile, seed = setting.profile, setting.profile.sweep_seed
    runs: Runs = []
    for method in tuning_groups:
        losses = {
            float(one.config.learning_rate): one.validation_loss(at_floor)
            for one in made
            if one.config.method == method and one.config.learning_rate is not None
        }
        if profile.first_rates:
            rates = next_rates(losses, profile.rates, profile.first_rates)
        else:
            rates = [rate for rate in profile.rates if rate not in losses]
        runs += [(make_run_config(setting, method, seed, rate), setting) for rate in rates]
    return runs


def expected_sweep(
    setting: RunSettings, tuning_groups: Sequence[str], made: Sequence[Record], at_floor: Collection[str] = ()
) -> Runs:
    """Return the next runs of the sweeps and those that they are likely to need after them.

    Before the first round nothing is known of the best rate. It is taken to be the middle one of the first.
    """
    profile, seed = setting.profile, setting.profile.sweep_seed
    runs = sweep_round(setting, tuning_groups, made, at_floor)
    if not profile.first_rates or made:
        return runs
    middle = profile.rates.index(profile.first_rates[len(profile.first_rates) // 2])
    later = [profile.rates[middle - 1], profile.rates[middle + 1]]
    return runs + [(make_run_config(setting, m, seed, rate), setting) for m in tuning_groups for rate in later]


def floor_runs(setting: RunSettings, made: Sequence[Record]) -> Runs:
    """Return the next single-task runs that tell which tasks are at floor; none if all are known.

    The base comes first. Each task of the mixture is trained alone at one rate and, if it fails there, at the next.

    Args:
        setting: Settings of the mixture's runs.
        made: Records of such runs so far.
    """
    if not made:
        runs = [(make_run_config(setting, BASE, 0), setting)]
        rate, mixtures = FLOOR_RATES[0], single_task_mixtures(setting.mixture_name)
    else:
        runs, rate = [], FLOOR_RATES[1]
        tried = [one for one in made if one.config.learning_rate == FLOOR_RATES[0]]
        learned = {one.config.mixture for one in made if any(floor.is_learned for floor in floors([one]))}
        mixtures = [one.config.mixture for one in tried if one.config.mixture not in learned]
        mixtures = [
            m for m in mixtures if not any(o.config.learning_rate == rate for o in made if o.config.mixture == m)
        ]
    for mixture in mixtures:
        alone = replace(setting, mixture=mixture)
        runs.append((make_run_config(alone, FLOOR_METHOD, TUNING_SEED, rate), alone))
    return runs
