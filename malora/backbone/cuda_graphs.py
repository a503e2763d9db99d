"""Capture of training and inference passes as CUDA graphs.

A pass of a small model launches thousands of short kernels, and the launches take the host longer than the kernels take
the GPU. A CUDA graph replays all of them by one launch. It reads and writes the same memory in each replay, so inputs
are copied into static tensors beforehand, and results must be used before the next replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from malora.backends import BACKENDS
from malora.weight_cache import WeightCache


def warm_up(run: Callable[[], Any], passes: int = 2) -> None:
    """Call `run` on a stream of its own, as a capture does.

    Kernels are compiled and libraries initialized in the first calls; neither may happen while a graph is captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(passes):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()  # the allocator keeps freed memory per stream, and this stream is not used again


def capture(run: Callable[[], Any], passes: int = 2, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Capture a call of `run` as a CUDA graph.

    Args:
        run: Work on static tensors, which waits for no result on the host.
        passes: Calls of `run` before the capture, see `warm_up`.
        pool: Memory pool of another graph, or None for a new one. Graphs that share a pool overwrite each other's
            results, so those of one must be used before another is replayed.

    Returns:
        The graph. `graph.replay()` runs it.
    """
    warm_up(run, passes)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except Exception:
        # The default generator would remain in capture mode, and every later random draw would fail.
        fresh = torch.Generator("cuda").graphsafe_get_state()
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
        raise
    return graph


def capture_refresh(weights: WeightCache) -> Callable[[], None]:
    """Capture `weights.refresh()` as a CUDA graph and return its replay.

    Call the replay once per optimizer step, before the graphs of the forward passes. The model must have run before.
    If there is nothing to refresh, the returned function does nothing.
    """
    weights.refresh()
    return capture(weights.refresh, passes=0).replay if weights else lambda: None


def accumulate_grads(sums: list[Tensor] | None, replayed: list[Tensor], alone: bool) -> list[Tensor]:
    """Add the gradients of a replayed micro-batch to those of the earlier ones.

    Args:
        sums: Result of the call for the previous micro-batch; None for the first one.
        replayed: Gradients in the memory of the graph. The next replay overwrites them.
        alone: Whether the batch has a single micro-batch. Then `replayed` itself is returned, without a copy.

    Returns:
        The sums so far.
    """
    if sums is None and alone:
        return replayed
    if sums is None:
        sums = [torch.empty_like(gradient) for gradient in replayed]
        if sums:  # the foreach functions refuse empty lists
            torch._foreach_copy_(sums, replayed)
    elif sums:
        torch._foreach_add_(sums, replayed)
    return sums


def can_capture(model: nn.Module) -> bool:
    """Return whether a pass of the model can be captured.

    It can if the model is on a GPU and its backends never wait for a result.
    """
    backends = {getattr(config, "backend", None) for config in getattr(model, "peft_config", {}).values()}
    is_on_gpu = next(model.parameters()).device.type == "cuda"
    return is_on_gpu and all(BACKENDS[name].graph_safe for name in backends if name is not None)
