"""Work as CUDA graphs: what thousands of small kernels do, launched at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from malora import WeightCache
from malora.backends import BACKENDS


def warm_up(run: Callable[[], Any], passes: int = 2) -> None:
    """Calls it as a capture does. Compilers and libraries set themselves up, which a graph cannot hold."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(passes):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()  # what those passes used is another stream's, and would stay so


def capture(run: Callable[[], Any], passes: int = 2, pool: Any = None) -> torch.cuda.CUDAGraph:
    """The call as a graph, after so many `passes` of it.

    Graphs of one `pool` share memory: what one of them leaves is good until another is replayed.
    """
    warm_up(run, passes)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except Exception:
        # The device's generator would take itself to be captured for ever, and no later work could use it.
        fresh = torch.Generator("cuda").graphsafe_get_state()
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
        raise
    return graph


def capture_refresh(weights: WeightCache) -> Callable[[], None]:
    """What refreshes the weights of a model that has run, as a graph: to be called before graphs of its passes."""
    weights.refresh()
    return capture(weights.refresh, passes=0).replay if weights else lambda: None


def accumulate_grads(sums: list[Tensor] | None, replayed: list[Tensor], alone: bool) -> list[Tensor]:
    """The gradients of a part of a batch added to those of the parts before it.

    They are copied first, unless the part is `alone`: the next replay writes where they stand.
    """
    if sums is None:
        if alone:
            return replayed
        sums, add = [torch.empty_like(gradient) for gradient in replayed], torch._foreach_copy_
    else:
        add = torch._foreach_add_
    if sums:  # many at a launch
        add(sums, replayed)
    return sums


def can_capture(model: nn.Module) -> bool:
    """Whether a CUDA graph can hold a pass: on a GPU, by backends that never wait for its results."""
    backends = {getattr(config, "backend", None) for config in getattr(model, "peft_config", {}).values()}
    return model.device.type == "cuda" and all(BACKENDS[name].graph_safe for name in backends - {None})
