"""Products that do not wait for each other, side by side in a CUDA graph.

Kernels of a small model leave most of a GPU idle, and most of a step is the time from one to the next. What is captured
on streams of its own, a graph runs at once. Outside of a graph the host's launches take longer than the kernels, so
there everything stays in one row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from malora.fused.tensor_utils import is_captured

MIN_SATURATING_ELEMENTS = 1 << 23  # elements of an input


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """The device's, as many as were ever needed: each keeps a workspace of the matrix products."""
    return []


def saturates_device(like: Tensor) -> bool:
    """Whether kernels over so large an input leave no room beside them; their works stay in one row.

    So do small works between them: a graph with a lane to the side takes longer from each kernel to the next.
    """
    return like.numel() >= MIN_SATURATING_ELEMENTS


def run_on_parallel_streams(like: Tensor, works: list[Callable[[], Any]]) -> list[Any]:
    """What works give that neither write to the same tensors nor read what another writes; on `like`'s device.

    Memory is the stream's that it was allocated on, and comes back to it: every stream waits for this one before it
    begins, and this one for all of them, so nobody can write to it while it is still read.
    """
    if saturates_device(like) or not is_captured(like):
        return [work() for work in works]
    here, streams = torch.cuda.current_stream(), _streams(like.device)
    streams += [torch.cuda.Stream(like.device) for _ in range(len(works) - 1 - len(streams))]
    begun, others = [], []
    try:
        for stream, work in zip(streams, works[1:], strict=False):
            stream.wait_stream(here)
            begun.append(stream)
            with torch.cuda.stream(stream):
                others.append(work())
        first = works[0]()
    finally:  # a capture that ends with a stream of its own left over would hide what went wrong
        for stream in begun:
            here.wait_stream(stream)
    return [first, *others]
