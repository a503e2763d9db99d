"""Capture of training and inference passes as CUDA graphs.

A pass of a small model launches thousands of short kernels, and the launches take the host longer than the kernels take
the GPU. A CUDA graph replays all of them by one launch. It reads and writes the same memory in each replay, so inputs
are copied into static tensors beforehand, and results must be used before the next replay.

These are the parts of which `malora.capture_step` is made. They serve loops that it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from malora.weight_cache import WeightCache


class SideStream:
    """A stream for warm-up and capture, next to the one that is current.

    Autograd runs the backward pass of a parameter on the stream that first used it. In a capture that must be the
    stream of the capture, so a pass that warms up for it runs on this stream, too.

    Attributes:
        stream: The stream; made when it is first used.
    """

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run work inside `with` on the stream, in order with the work before and after it."""
        self.stream = self.stream or torch.cuda.Stream()
        outer = torch.cuda.current_stream()
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            yield
        outer.wait_stream(self.stream)


def warm_up(run: Callable[[], Any], passes: int = 2) -> None:
    """Call `run` on a stream of its own, as a capture does.

    Kernels are compiled and libraries initialized in the first calls; neither may happen while a graph is captured.
    """
    with SideStream().active():
        for _ in range(passes):
            run()
    torch.cuda.empty_cache()  # the allocator keeps freed memory per stream, and this stream is not used again


def capture(
    run: Callable[[], Any], passes: int = 2, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> torch.cuda.CUDAGraph:
    """Capture a call of `run` as a CUDA graph.

    Args:
        run: Work on static tensors, which waits for no result on the host.
        passes: Calls of `run` before the capture, see `warm_up`.
        pool: Memory pool of another graph, or None for a new one. Graphs that share a pool overwrite each other's
            results, so those of one must be used before another is replayed.
        stream: Stream to capture on; None for torch's own.

    Returns:
        The graph. `graph.replay()` runs it.
    """
    if passes:
        warm_up(run, passes)
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    random_state, outer = generator.clone_state(), torch.cuda.current_stream()
    try:
        # Other threads may go on meanwhile, such as that of a DataLoader which pins memory.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
    except Exception:
        # The default generator would remain in capture mode, and every later random draw would fail. The stream would
        # remain the one of the capture.
        generator.graphsafe_set_state(random_state)
        torch.cuda.set_stream(outer)
        # Before 2.12 torch leaves the allocator in the capture, and emptying its cache fails then (its issue 180395).
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
        raise
    return graph


def capture_refresh(weights: WeightCache) -> Callable[[], None]:
    """Capture `weights.refresh()` as a CUDA graph and return its replay.

    Call the replay once per optimizer step, before the graphs of the forward passes. The model must have run before.
    If there is nothing to refresh, the returned function does nothing.
    """
    weights.refresh()
    return capture(weights.refresh, passes=0).replay if weights else lambda: None
