"""Make many runs, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache

from bench.errors import UserError
from bench.records.schema import Record, RunConfig
from bench.runs.plan import Runs
from bench.runs.run import find_record, remove_unfinished, run
from bench.runs.setting import RunSettings
from bench.runs.together import run_together
from bench.runs.workers import follow_parent, sigint_blocked, stopped_at_the_end, work
from bench.runtime.processes import processes

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

# A new Python, because CUDA cannot be used in a forked process.
START_METHOD = "spawn"


def run_all(runs: Runs, jobs: int, together: int = 1) -> Generator[Record]:
    """Make the runs that have no record yet, and yield all records.

    Each record is yielded as soon as it is there.

    A run that finds no memory next to the others is made again by itself at the end.

    Args:
        runs: Configurations with their settings.
        jobs: Number of runs at a time, each in a process of its own.
        together: Maximum number of runs that train in the same forward passes; with more than one, `jobs` is 1.
    """
    done, missing = split_recorded(runs)
    yield from done
    if together > 1:
        yield from run_together(missing, together)
        return
    if jobs == 1 or len(missing) <= 1:
        for config, setting in missing:
            yield run(config, setting)
        return
    out_of_memory: Runs = []
    yield from _run_in_pool(missing, jobs, out_of_memory)
    for config, setting in out_of_memory:
        yield run(config, setting)


def split_recorded(runs: Runs) -> tuple[list[Record], Runs]:
    """Return the records that there are, and the runs that have none.

    What recorded runs have left is removed: a process may have been killed after it wrote a record.
    """
    done = {config.id: found for config, setting in runs if (found := find_record(config, setting))}
    processes().wait_for_everyone()  # they must agree on the runs that are missing
    for config, setting in runs:
        if config.id in done:
            remove_unfinished(config, setting)
    return list(done.values()), [(config, setting) for config, setting in runs if config.id not in done]


def _run_in_pool(runs: Runs, jobs: int, out_of_memory: Runs) -> Generator[Record]:
    """Make runs in worker processes and yield each record once it is there.

    If it is left early, by Ctrl-C or an error, no run begins any more, and no worker lives when it returns.

    Args:
        runs: Configurations with their settings, none of which has a record.
        jobs: Number of worker processes.
        out_of_memory: Gets the runs that found no memory next to the others.

    Raises:
        UserError: A worker was killed from outside.
    """
    # Processes, because threads would share the interpreter lock and the global state of the libraries.
    context = multiprocessing.get_context(START_METHOD)
    counter = context.Value("i", 0)
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(jobs, len(runs)), context, _start_worker, (counter, os.getpid(), reader, writer))
    try:
        with stopped_at_the_end(writer):
            with sigint_blocked():
                futures = {pool.submit(_run_in_worker, one, setting, jobs): (one, setting) for one, setting in runs}
            for future in as_completed(futures):
                if record := future.result():
                    yield record
                else:
                    out_of_memory.append(futures[future])
            pool.shutdown()  # the workers end before their pipe is closed
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps because memory was short; run the same command again to continue, "
            "with fewer --jobs if it happens again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _run_in_worker(config: RunConfig, setting: RunSettings, jobs: int) -> Record | None:
    """Make one of several concurrent runs; None if the others left too little memory."""
    try:
        return work(lambda: run(config, setting, jobs))
    except torch.OutOfMemoryError:
        pass  # the exception keeps the run's tensors alive until here
    clear_device_cache(garbage_collection=True)
    return None


def _start_worker(counter: Synchronized[int], parent_id: int, reader: Connection, writer: Connection) -> None:
    """Let the worker end with its parent, and assign the GPUs to the workers in turn."""
    follow_parent(parent_id, reader, writer)
    os.environ.pop("LOCAL_RANK", None)  # with it accelerate would take the workers for one process of torchrun
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries address these to developers
