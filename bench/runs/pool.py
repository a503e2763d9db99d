"""Make many runs, several at a time."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from accelerate.utils.memory import clear_device_cache

from bench.records.schema import Record, RunConfig
from bench.runs.run import find_record, run
from bench.runs.setting import RunSettings


def run_all(runs: list[tuple[RunConfig, RunSettings]], jobs: int) -> Iterator[Record]:
    """Make the runs that the results folder does not have, `jobs` at a time; yields each as it is there.

    What finds no memory beside others is made again when they are done, by itself.
    """
    done = {config.id: found for config, setting in runs if (found := find_record(config, setting))}
    yield from done.values()
    missing = [(config, setting) for config, setting in runs if config.id not in done]
    if jobs == 1 or len(missing) <= 1:
        for config, setting in missing:
            yield run(config, setting)
        return
    # Processes, each with models and libraries of its own: threads would take turns at the interpreter.
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with ProcessPoolExecutor(min(jobs, len(missing)), context, _start_worker, (number,)) as pool:
        futures = {pool.submit(_run_beside, config, setting, jobs): (config, setting) for config, setting in missing}
        crowded_out = []
        try:
            for future in as_completed(futures):
                if record := future.result():
                    yield record
                else:
                    crowded_out.append(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for config, setting in crowded_out:
        yield run(config, setting)


def _run_beside(config: RunConfig, setting: RunSettings, jobs: int) -> Record | None:
    """A run among several at a time; None if it found no memory beside the others."""
    try:
        return run(config, setting, jobs)
    except torch.OutOfMemoryError:
        pass  # it holds the run's tensors until here
    clear_device_cache(garbage_collection=True)
    return None


def _start_worker(number) -> None:
    """Workers take the GPUs in turn."""
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(mine % torch.cuda.device_count())
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, to their developers
