"""Independent tasks on parallel CUDA streams.

The kernels of a small model leave most of a GPU idle. Tasks that are captured on separate streams become parallel
branches of a CUDA graph, and run at the same time when it is replayed. Outside graph capture the host's launches take
longer than the kernels, so parallel streams gain nothing, and all tasks run on the current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from malora.fused.tensor_utils import is_captured

# Elements of an input from which on a single task keeps the GPU busy; parallel branches would then only add the
# graph's own synchronization.
MIN_SATURATING_ELEMENTS = 1 << 23


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Return the device's side streams.

    The list grows on demand; cuBLAS keeps a workspace for each stream.
    """
    return []


def saturates_device(like: Tensor) -> bool:
    """Return whether tasks over an input of this size keep the GPU busy one by one.

    All tasks of such a pass then run on the current stream, the small ones as well: a branch in a graph delays each
    kernel that follows it.
    """
    return like.numel() >= MIN_SATURATING_ELEMENTS


def run_on_parallel_streams(like: Tensor, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run independent tasks, in parallel if a CUDA graph is being captured.

    Their results are returned in order.

    Args:
        like: The tasks' input, which tells their device and size.
        tasks: No task may write a tensor that another one reads or writes. The first runs on the current stream.

    The caching allocator reuses freed memory on the stream where it was allocated. Each side stream first waits for the
    current one, which in the end waits for all of them. So no memory is reused while a task still reads it.
    """
    if saturates_device(like) or not is_captured(like):
        return [task() for task in tasks]
    current, streams = torch.cuda.current_stream(), _streams(like.device)
    for _ in range(len(tasks) - 1 - len(streams)):
        streams.append(torch.cuda.Stream(like.device))
    started, others = [], []
    try:
        for stream, task in zip(streams, tasks[1:], strict=False):
            stream.wait_stream(current)
            started.append(stream)
            with torch.cuda.stream(stream):
                others.append(task())
        first = tasks[0]()
    finally:  # a capture that ended with an unjoined stream would raise an error of its own and hide the task's
        for stream in started:
            current.wait_stream(stream)
    return [first, *others]
