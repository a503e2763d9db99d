"""The processes that a launcher has started to share a run."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.environment import parse_flag_from_env

from bench.errors import UserError

# Variables by which torchrun, `accelerate launch` and MPI tell a process how many there are.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# The other processes wait for hours while the first one scores.
TIMEOUT = timedelta(hours=12)
# With any other kind a process has only a part of the adapter, and the first process would save that part.
DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def processes() -> PartialState:
    """Return this process's place among those that share a run.

    accelerate connects processes without a GPU only if it is told to use the CPU. Otherwise each of them takes itself
    for the only one.

    Raises:
        UserError: A launcher has started several processes, but accelerate does not connect them. Each would make
            the whole run.
    """
    name, started = started_processes()
    separate = UserError(
        f"{name} is {started}, but these processes are not connected, so each would make the whole run; "
        f"start them with torchrun or `accelerate launch --multi_gpu`, or unset {name}."
    )
    if started > 1 and not any(rank in os.environ for rank in RANKS):
        raise separate  # on a CPU accelerate would wait for the others
    use_cpu = not torch.cuda.is_available() or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))
    state = PartialState(cpu=use_cpu, timeout=TIMEOUT)
    if state.num_processes != started:
        raise separate
    return state


def started_processes() -> tuple[str, int]:
    """Return how many processes the launcher says it has started.

    Returns:
        The environment variable that says so, and the number. Without a launcher that is 1.
    """
    for name in WORLD_SIZES:
        if (value := os.environ.get(name, "")).isdecimal() and int(value) > 0:
            return name, int(value)
    return WORLD_SIZES[0], 1


def make_accelerator(mixed_precision: str) -> Accelerator:
    """Make an accelerator for data-parallel training in the processes of `processes()`.

    Args:
        mixed_precision: "bf16" or "no".

    Raises:
        UserError: The launcher was told to split the model, or to accumulate gradients.
    """
    processes()  # the first to ask decides on device and timeout
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if accelerator.distributed_type not in DATA_PARALLEL:
        raise UserError(
            f"this benchmark trains data-parallel only, not with {accelerator.distributed_type.value}; "
            "start it with torchrun or `accelerate launch --multi_gpu`."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            "the profile decides the batch, and a batch is split into micro-batches by itself; "
            "unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS."
        )
    return accelerator
