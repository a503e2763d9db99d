"""Say before a command starts what it is going to do, and how long that takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tabulate import tabulate

from bench.records.provenance import device_name
from bench.records.schema import Record, RunConfig
from bench.runs.estimate import estimate, missing_runs, summarize
from bench.runs.plan import Runs
from bench.runs.setting import RunSettings, load_data
from bench.runs.work import duration


def announce(title: str, runs: Runs, records: Sequence[Record], jobs: int, *, dry_run: bool) -> None:
    """Print an estimate of the time, to the standard error; for a dry run, print the missing runs too.

    Args:
        title: Name of the command.
        runs: All its runs.
        records: Records to estimate from.
        jobs: Runs at a time.
        dry_run: Whether the runs are not going to be made.
    """
    missing = missing_runs(runs)
    estimates = [estimate(config, setting, records, device_name(setting.device), jobs) for config, setting in missing]
    if dry_run and missing:
        body = [
            (config.id, duration(one.seconds), one.source) for (config, _), one in zip(missing, estimates, strict=True)
        ]
        print(tabulate(body, ["run", "about", "from"], disable_numparse=True))
    print(summarize(title, runs, missing, estimates, jobs), file=sys.stdout if dry_run else sys.stderr, flush=True)


def announce_scoring(config: RunConfig, setting: RunSettings, records: Sequence[Record]) -> None:
    """Print the number of items and an estimate of the time, to the standard error.

    Args:
        config: Configuration of an adapter that is only scored.
        setting: Settings of the scoring.
        records: Records to estimate from.
    """
    tests = load_data(setting, config.seed).test
    items = sum(len(test[: config.max_items]) for test in tests.values())
    one = estimate(config, setting, records, device_name(setting.device))
    tasks = f"{len(tests)} task{'s' * (len(tests) > 1)}"
    text = f"score: {items:,} items of {tasks}, about {duration(one.seconds)} ({one.source})."
    print(text, file=sys.stderr, flush=True)
