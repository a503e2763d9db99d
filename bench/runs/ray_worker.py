"""What a worker of the Ray engine does: it claims a run and makes it.

A worker that loses its claim ends at once, because two processes would write the same checkpoints.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache

from bench.errors import UserError
from bench.records import provenance
from bench.records.claims import ClaimLostError, ClaimState, acquire
from bench.records.remote import RemoteFolder, place_of_claim
from bench.records.schema import Record, RunConfig
from bench.runs.remote_run import run_remotely
from bench.runs.run import run
from bench.runs.setting import RunSettings, make_run_config

WORKER_LOST = 1  # exit code

# What a task returns instead of a record.
CLAIMED = "claimed by another process"
NO_MEMORY = "no memory next to other runs"


@dataclass(frozen=True)
class Task:
    """What a worker must know to make a run.

    Attributes:
        config: Configuration of the run.
        setting: Its settings.
        jobs: Runs that share its GPU, or the machine's CPU.
        expired: A claim on the run to take over; None if there was none.
        folder: Working directory of the driver, to which paths are relative.
        mark: A file that the driver has put into the folder of results, or into that of `remote` under the same name.
        sources: Hash of the driver's sources.
        remote: The folder that all machines reach; None if they mount the folder of results.
    """

    config: RunConfig
    setting: RunSettings
    jobs: int
    expired: ClaimState | None
    folder: Path
    mark: Path
    sources: str
    remote: RemoteFolder | None = None


def make_in_worker(task: Task) -> Record | str:
    """Make a run in a worker of Ray.

    Returns:
        The record, or the reason why there is none yet.

    Raises:
        UserError: This machine does not fit the driver's.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries address these to developers
    os.environ.pop("LOCAL_RANK", None)  # of a launcher that has started Ray
    _require_same_machine(task)
    config, setting = task.config, task.setting
    place = place_of_claim(config.id, setting.results, task.remote)
    claim = acquire(place, task.expired, on_loss=partial(_end_worker, config.id))
    if claim is None:
        return CLAIMED
    with claim:
        try:
            if task.remote:
                return run_remotely(config, setting, task.jobs, claim, task.remote)
            return run(config, setting, task.jobs, claim=claim)
        except ClaimLostError:
            return CLAIMED
        except torch.OutOfMemoryError:
            pass  # the exception keeps the run's tensors alive until here
        clear_device_cache(garbage_collection=True)
        return NO_MEMORY


def _require_same_machine(task: Task) -> None:
    """Check that this machine has the driver's folders, sources, base model and data.

    Raises:
        UserError: It has not.
    """
    host = socket.gethostname()
    if task.remote and not (task.folder.is_dir() and task.remote.exists(task.mark.name)):
        raise UserError(
            f"{host} does not see {task.remote} or {task.folder} as the machine of this command does; "
            "all machines of the cluster need access to the URL of --storage, and the checkout at the same path."
        )
    if not task.remote and not (task.folder.is_dir() and task.mark.exists()):
        raise UserError(
            f"{host} does not see {task.mark.parent} as the machine of this command does; "
            "all machines of the cluster need the checkout and --results on storage that they share."
        )
    os.chdir(task.folder)
    if provenance.source_hash() != task.sources:
        raise UserError(f"{host} has other sources of malora, tasks or bench in {provenance.ROOT}; update them.")
    config = task.config
    here = make_run_config(task.setting, config.method, config.seed, config.learning_rate)
    if differing := [name for name, value in here if value != getattr(config, name)]:
        raise UserError(
            f"{host} would make another run: its {', '.join(differing)} differ. Give all machines the same data and "
            "base model, such as by a MALORA_CACHE that they share, and the same kind of device."
        )


def _end_worker(run_id: str) -> None:
    """End this process, whose run another process has taken over; Ray repeats the task, which then returns."""
    print(f"{run_id}: another process has taken over this run, so this worker ends.", file=sys.stderr, flush=True)
    os._exit(WORKER_LOST)
