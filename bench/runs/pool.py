"""Make many runs, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache

from bench.records.schema import Record, RunConfig
from bench.runs.plan import Runs
from bench.runs.run import find_record, run
from bench.runs.setting import RunSettings
from bench.runs.together import run_together
from bench.runtime.processes import processes

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized


def run_all(runs: Runs, jobs: int, together: int = 1) -> Iterator[Record]:
    """Make the runs that have no record yet, and yield all records.

    Each record is yielded as soon as it is there.

    A run that finds no memory next to the others is made again by itself at the end.

    Args:
        runs: Configurations with their settings.
        jobs: Number of runs at a time, each in a process of its own.
        together: Maximum number of runs that train in the same forward passes; with more than one, `jobs` is 1.
    """
    done = {config.id: found for config, setting in runs if (found := find_record(config, setting))}
    processes().wait_for_everyone()  # they must agree on the runs that are missing
    yield from done.values()
    missing = [(config, setting) for config, setting in runs if config.id not in done]
    if together > 1:
        yield from run_together(missing, together)
        return
    if jobs == 1 or len(missing) <= 1:
        for config, setting in missing:
            yield run(config, setting)
        return
    # Processes, because threads would share the interpreter lock and the global state of the libraries.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(min(jobs, len(missing)), context, _start_worker, (counter,)) as pool:
        futures = {pool.submit(_run_in_worker, config, setting, jobs): (config, setting) for config, setting in missing}
        out_of_memory = []
        try:
            for future in as_completed(futures):
                if record := future.result():
                    yield record
                else:
                    out_of_memory.append(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for config, setting in out_of_memory:
        yield run(config, setting)


def _run_in_worker(config: RunConfig, setting: RunSettings, jobs: int) -> Record | None:
    """Make one of several concurrent runs; None if the others left too little memory."""
    try:
        return run(config, setting, jobs)
    except torch.OutOfMemoryError:
        pass  # the exception keeps the run's tensors alive until here
    clear_device_cache(garbage_collection=True)
    return None


def _start_worker(counter: Synchronized[int]) -> None:
    """Assign the GPUs to the workers in turn."""
    os.environ.pop("LOCAL_RANK", None)  # with it accelerate would take the workers for one process of torchrun
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries address these to developers
