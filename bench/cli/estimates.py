"""Say before a command starts which runs are missing, and how long they take."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tabulate import tabulate

from bench.records.provenance import device_name
from bench.records.schema import Record
from bench.runs.estimate import duration, estimate, missing_runs, summarize
from bench.runs.plan import Runs


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
