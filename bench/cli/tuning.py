"""Runs that come before a table: sweeps of learning rates, and single tasks that tell which ones are at floor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from contextlib import closing

from tabulate import tabulate

from bench.cli.engines import Engine, count_jobs, opened_engine
from bench.cli.estimates import announce
from bench.experiments.floors import floors
from bench.experiments.methods import BASE
from bench.records import schema, store
from bench.runs.plan import Runs
from bench.runs.run import find_record
from bench.runs.setting import RunSettings
from bench.runs.sweep import floor_runs, sweep_round
from bench.runtime.processes import processes
from tasks import TASKS


def run_and_print(engine: Engine, runs: Runs, title: str) -> list[schema.Record]:
    """Make the runs and print a line per run to the standard error."""
    records = []
    with closing(engine.make(runs)) as made:  # an exception here ends the workers before it is reported
        for number, one in enumerate(made, 1):
            records.append(one)
            if not processes().is_main_process:
                continue
            result = (
                f"mean {one.mean():.1f}" if one.status == "ok" else f"{one.status}: {(one.error or '').splitlines()[0]}"
            )
            print(f"{title} {number}/{len(runs)} {one.config.id}: {result}", file=sys.stderr, flush=True)
    return records


def known_sweep(
    setting: RunSettings, tuning_groups: Sequence[str], at_floor: Collection[str] = ()
) -> list[schema.Record]:
    """Return the records that the sweeps have in the results folder, up to the first missing one.

    Args:
        setting: What the runs have in common.
        tuning_groups: The methods.
        at_floor: Tasks whose loss does not count.
    """
    made: list[schema.Record] = []
    while found := [one for run in sweep_round(setting, tuning_groups, made, at_floor) if (one := find_record(*run))]:
        made += found
    return made


def make_sweep(
    engine: Engine, setting: RunSettings, tuning_groups: Sequence[str], at_floor: Collection[str]
) -> list[schema.Record]:
    """Make the sweeps of all methods, round by round, and return their records.

    Args:
        engine: Makes the runs.
        setting: What the runs have in common.
        tuning_groups: The methods.
        at_floor: Tasks whose loss does not count.
    """
    made: list[schema.Record] = []
    while runs := sweep_round(setting, tuning_groups, made, at_floor):
        found = run_and_print(engine, runs, "sweep")
        made += found
        if any(one.status == "failed" for one in found):  # it has no record, and would be made again without end
            break
    return made


def make_floors(
    setting: RunSettings, title: str, options: argparse.Namespace, published: Sequence[schema.Record]
) -> int:
    """Score the base, train a LoRA on each task alone, and print which tasks are learned.

    Args:
        setting: Settings of the mixture's runs.
        title: Name of the command.
        options: Its options.
        published: Records to estimate the time from.

    Returns:
        1 if a run failed, else 0.
    """
    runs = floor_runs(setting, [])
    if options.dry_run:
        if processes().is_main_process:
            announce(f"{title} --floors", runs, published, count_jobs(options, setting), dry_run=True)
        return 0
    store.open_folder(setting.results)
    made: list[schema.Record] = []
    with opened_engine(options, setting) as engine:
        if processes().is_main_process:
            announce(f"{title} --floors", runs, published, engine.at_a_time, dry_run=False)
        while runs:
            found = run_and_print(engine, runs, "floors")
            made += found
            if any(one.status == "failed" for one in found):
                return 1
            runs = floor_runs(setting, made)
    if processes().is_main_process:
        print(_floors_table(made))
    return 0


def _floors_table(made: Sequence[schema.Record]) -> str:
    """Return a line per task: scores of the base and of the adapter, chance, and the verdict."""
    base = next(one.test or {} for one in made if one.config.method == BASE)
    body = [
        [
            TASKS[floor.task].title,
            f"{100 * base[floor.task].value:.1f}",
            f"{100 * floor.value:.1f}",
            f"{100 * floor.error:.1f}",
            f"{100 * floor.chance:.1f}",
            f"{floor.rate:g}",
            "learned" if floor.is_learned else "at floor",
        ]
        for floor in floors(made)
    ]
    head = ["task", "base, test", "LoRA alone, validation", "standard error", "chance", "rate", ""]
    return str(tabulate(body, head, disable_numparse=True))
