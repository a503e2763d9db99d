"""Pack a model's weights once per optimizer step instead of once per micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from malora.layer import MaloraLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from malora.fused.group import ProjectionGroup
    from malora.fused.packed_weights import PackedBuffer
    from malora.fused.weight_cache import Form, GroupAdapter


class WeightCache:
    """Packed weights of a model that several forward passes with gradients share.

    The fused backends read packed copies of an adapter's weights. A fused optimizer does not increase
    `Tensor._version`, so they cannot detect that weights are unchanged and pack them in every pass. A training loop
    that accumulates gradients knows better:

        cache = malora.WeightCache(model)
        for micro_batches in batches:
            cache.refresh()
            with cache:
                for micro_batch in micro_batches:
                    loss_of(model, micro_batch).backward()
            optimizer.step()

    The cache has no effect in the first forward pass, under `torch.no_grad()`, or with other backends. If you capture
    CUDA graphs, capture `refresh()` in a graph of its own and replay it before the graphs of the forward passes. The
    copies stay at their addresses until `refresh()` finds that the model would train other adapters, or in another
    dtype or on another device; capture graphs anew then.

    Args:
        model: a model with adapters of this package.
    """

    def __init__(self, model: nn.Module) -> None:
        self._groups = list(dict.fromkeys(projection_groups(model)))
        self._prepare()
        self._forms: list[tuple[GroupAdapter, Form]] = []
        self._buffers: list[tuple[PackedBuffer, list[GroupAdapter]]] = []
        self._up_scales: dict[GroupAdapter, Tensor | None] = {}  # factors of h in float8
        self._depth = 0  # of nested `with` statements

    def __bool__(self) -> bool:
        """Return whether there is anything to refresh."""
        return bool(self._buffers)

    def refresh(self) -> None:
        """Pack the weights of all layers that have been in a training pass.

        Call it after each optimizer step. If a forward pass ran before it, the backward pass of that raises a
        RuntimeError.
        """
        self._prepare()
        adapters = (adapter for group in self._groups for adapter in group.trained_adapters())
        forms = [(adapter, form) for adapter in adapters if (form := adapter.next_form)]
        if forms != self._forms:
            from malora.fused.weight_cache import pack_together  # needs Triton

            self._activate(False)
            self._forms, self._buffers, self._up_scales = forms, pack_together(forms), {}
        for group in self._groups:
            if group.has_cache:
                group.cache.loaded = None
        for buffer, group_adapters in self._buffers:
            from malora.fused.bases import load_up_proj_for_step
            from malora.fused.weight_cache import fill_buffer

            fill_buffer(buffer, group_adapters)
            torch.autograd.graph.increment_version(buffer.flat)  # our kernels do not
            for adapter, packed in zip(group_adapters, buffer.weights, strict=True):
                self._up_scales[adapter] = load_up_proj_for_step(adapter, packed, self._up_scales.get(adapter))
        self._activate(self._depth > 0)

    def _prepare(self) -> None:
        for group in self._groups:
            group.prepare()

    def _activate(self, is_active: bool) -> None:
        for buffer, group_adapters in self._buffers:
            for adapter, packed in zip(group_adapters, buffer.weights, strict=True):
                adapter.step = packed if is_active else None

    def __enter__(self) -> WeightCache:
        self._depth += 1
        self._activate(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._activate(self._depth > 0)


def projection_groups(model: nn.Module) -> Iterator[ProjectionGroup]:
    """Iterate over the projection groups of a model's adapted layers, one per layer."""
    return (module.group for module in model.modules() if isinstance(module, MaloraLayer))


def release_caches(model: nn.Module) -> None:
    """Free all copies of weights that the fused backends keep for a model.

    These are packed weights, float8 weights and the padded columns of `malora.optimize_backbone`. The next forward
    pass makes packed and float8 weights again; padded columns need another call of `optimize_backbone`. A `WeightCache`
    keeps its buffers until its next `refresh()`. CUDA graphs that were captured before may read freed memory.
    """
    for group in dict.fromkeys(projection_groups(model)):
        group.clear_caches(include_frozen=True)
