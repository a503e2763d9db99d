"""The engines that make the runs of a table: processes of this machine, or Ray."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from bench.errors import UserError
from bench.records import store
from bench.records.remote import open_remote
from bench.records.schema import Record
from bench.runs.plan import Runs
from bench.runs.pool import run_all
from bench.runs.ray_engine import connected, require_ray
from bench.runs.setting import RunSettings
from bench.runtime.processes import processes

ENGINES = ("local", "ray")


class Engine(NamedTuple):
    """What makes runs.

    Attributes:
        at_a_time: Number of runs at a time.
        make: Makes the runs that have no record yet, and yields all records, each as soon as it is there.
    """

    at_a_time: int
    make: Callable[[Runs], Generator[Record]]


def check_engine(options: argparse.Namespace, setting: RunSettings) -> None:
    """Check the options that choose an engine, before anything is written.

    Raises:
        UserError: They contradict each other, or Ray is not installed.
    """
    _require_one_way(options)
    if options.engine == "local":
        if options.storage:
            raise UserError("--storage is for --engine ray; other runs are recorded in --results.")
        if options.gpus_per_run is not None:
            raise UserError("--gpus-per-run is for --engine ray; choose the number of runs at a time with --jobs.")
        return
    require_ray()
    if options.gpus_per_run is not None and setting.device.type != "cuda":
        raise UserError("--gpus-per-run needs a GPU, and this machine has none; without one a run has a CPU core.")
    if options.storage:
        _require_local_use(options)
        open_remote(options.storage)


def pull_records(options: argparse.Namespace, setting: RunSettings) -> None:
    """Download the records of `--storage` into the folder of results, after `check_engine`.

    What killed processes have left in the storage is removed, unless it is a dry run.

    Raises:
        UserError: The folder of results cannot be written to.
    """
    if options.storage:
        store.open_folder(setting.results)
        remote = open_remote(options.storage)
        if not options.dry_run:
            remote.remove_leftovers()
        remote.pull_records(setting.results)


def _require_local_use(options: argparse.Namespace) -> None:
    """Check that the runs write nothing but records and checkpoints, because `--storage` has nothing else."""
    if options.track:
        raise UserError(
            "--track writes to a folder, and --storage has records and checkpoints only; leave out one of them."
        )
    if options.experiment.figure == "similarity" and not options.floors:
        raise UserError(
            "the runs of this figure compare saved adapters, and --storage has records and checkpoints only; "
            "name a folder that all machines mount as --results."
        )


def _require_one_way(options: argparse.Namespace) -> None:
    """Check that several runs at a time are asked for in one way only."""
    if options.engine == "ray":
        if processes().num_processes > 1:
            raise UserError("--engine ray starts its own processes; start the command without a launcher.")
        if options.together > 1:
            raise UserError(f"--together {options.together} is for --engine local; choose one of them.")
        return
    if options.together > 1 and processes().num_processes > 1:
        raise UserError(
            f"--together {options.together} trains runs in one process, and a launcher has started "
            f"{processes().num_processes}; start the command without it."
        )
    if options.together > 1 and (options.jobs or 1) > 1:
        raise UserError(
            f"--together {options.together} trains runs in one process, and --jobs {options.jobs} in several; "
            "choose one of them."
        )


def count_jobs(options: argparse.Namespace, setting: RunSettings) -> int:
    """Return the number of runs at a time on this machine.

    The number is 1 if a launcher has started several processes, because they share a run, and if runs train together.
    """
    if processes().num_processes > 1 or options.together > 1:
        return 1
    return options.jobs or (_count_cores() if setting.device.type == "cpu" else 1)


def _count_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def opened_engine(options: argparse.Namespace, setting: RunSettings) -> Iterator[Engine]:
    """Open the engine that the options ask for, after `check_engine`. The folder of results exists."""
    if options.engine == "local":
        jobs = count_jobs(options, setting)
        yield Engine(jobs, partial(run_all, jobs=jobs, together=options.together))
        return
    cpus = setting.profile.threads or 1
    remote = open_remote(options.storage) if options.storage else None
    with connected(setting.results, setting.device, options.gpus_per_run, cpus, options.jobs, remote) as sweep:
        yield Engine(sweep.places(), sweep.make)
