"""Projection groups: layers that read the same input and are computed together.

Q, K and V of an attention block read the same input; so do Gate and Up of an MLP. Each layer stays a module of its own
and is called by the model's code as before. The first one that is called computes all of them, and the others fetch
their output.

This module needs no Triton, so that every adapted layer can belong to a group. Modules that need it are imported in the
functions that use them.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from malora.fused.protocol import FusedLayer
    from malora.fused.weight_cache import GroupAdapter, GroupWeightCache

# Layers of one parent that read the same input, under the names that model architectures use.
PROJECTION_GROUPS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


class ProjectionGroup:
    """Layers that read the same input, and the copies of their weights.

    Attributes:
        layers: the layers, in the order in which they were adapted.
        is_sharded: whether FSDP2 had sharded them when the model's last forward pass began.
    """

    def __init__(self) -> None:
        self.layers: list[FusedLayer] = []
        self.is_sharded = False
        self._adapters: dict[tuple[str, tuple[int, ...]], GroupAdapter] = {}
        self._forget_outputs()

    @cached_property
    def cache(self) -> GroupWeightCache:
        """Copies of the layers' weights."""
        from malora.fused.weight_cache import GroupWeightCache  # needs Triton

        return GroupWeightCache()

    @property
    def has_cache(self) -> bool:
        """True once the fused path has run, or was prepared."""
        return "cache" in vars(self)

    def _forget_outputs(self) -> None:
        self._input: Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectionGroup:
        """Copy the layers only.

        Copies of weights and outputs that wait to be fetched stay with the original.
        """
        copied = memo[id(self)] = ProjectionGroup()
        copied.layers = copy.deepcopy(self.layers, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ProjectionGroup.__init__(self)
        self.layers = state["layers"]

    def adapter_on(self, layers: list[FusedLayer], adapter: str) -> GroupAdapter:
        """Return an adapter on some layers of the group.

        It is the same object until `clear_caches`.
        """
        from malora.fused.weight_cache import GroupAdapter  # needs Triton

        key = adapter, tuple(map(id, layers))
        if key not in self._adapters:
            self._adapters[key] = GroupAdapter(layers, adapter, self.cache)
        return self._adapters[key]

    def trained_adapters(self) -> list[GroupAdapter]:
        """Return adapters that ran since the last `clear_caches` and would run again."""
        return [adapter for adapter in self._adapters.values() if adapter.can_run()]

    def clear_inference_cache(self) -> None:
        """Drop packed weights of passes without gradients; the weights may have changed."""
        for adapter in self._adapters.values():
            adapter.inference = None

    def clear_caches(self, *, include_frozen: bool = False) -> None:
        """Drop all packed weights, for example because an adapter was added.

        The next pass packs them again.

        Args:
            include_frozen: also drop float8 copies of frozen weights, and the columns next to them.
        """
        self._adapters.clear()
        self._forget_outputs()
        if not self.has_cache:
            return
        self.cache.loaded = None
        if include_frozen:
            from malora.fused.augmented_weights import free_padding  # needs Triton

            self.cache.float8.clear()
            free_padding(self.layers, self.cache)

    def clear_float8(self) -> None:
        """Drop float8 copies of frozen weights; the next pass makes them again."""
        if self.has_cache:
            self.cache.float8.clear()

    def drop_unused_padding(self) -> None:
        """Drop float8 copies whose padded columns fit no adapter that is left."""
        if self.has_cache and self.cache.float8:
            from malora.fused.fp8_weights import padded_rank  # needs Triton

            configs = [config for layer in self.layers for config in layer.settings.values()]
            in_use = {0} | {padded_rank(config.num_experts * config.r) for config in configs}
            self.cache.float8 = {key: found for key, found in self.cache.float8.items() if key[-1] in in_use}

    # A compiled layer calls the kernels, and does not trace them.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def output(self, layer: FusedLayer, adapter: str, x: Tensor) -> Tensor:
        """Return a layer's output [..., m] for x [..., n], the frozen layer included."""
        if x.is_inference():  # such a tensor has no version, so that a change of it could not be seen
            return self._compute([layer], adapter, x)[0]
        state = (adapter, x._version, torch.is_grad_enabled(), layer.training)
        if x is not self._input or state != self._state or id(layer) not in self._outputs:
            self._forget_outputs()
            together = [o for o in self.layers if o is layer or _can_share(o, layer, adapter)]
            if len(together) == 1:
                return self._compute(together, adapter, x)[0]
            self._outputs = {id(o): y for o, y in zip(together, self._compute(together, adapter, x), strict=True)}
            self._input, self._state = x, state
        y = self._outputs.pop(id(layer))
        if not self._outputs:
            self._forget_outputs()
        return y

    def _compute(self, layers: list[FusedLayer], adapter: str, x: Tensor) -> list[Tensor]:
        from malora.fused.autograd import forward_group  # needs Triton

        if torch.is_grad_enabled():
            self.clear_inference_cache()  # an optimizer step may follow and change the weights
        return forward_group(self.adapter_on(layers, adapter), x)


def has_one_layout(layers: list[FusedLayer], adapter: str) -> bool:
    """Return whether one kernel can compute an adapter on all these layers.

    With `rank_pattern` or `alpha_pattern` they may have different ranks and scalings.
    """
    first, *others = (layer.settings[adapter] for layer in layers)
    return all(c is first or (c.r, c.scaling) == (first.r, first.scaling) for c in others)


def _can_share(other: FusedLayer, layer: FusedLayer, adapter: str) -> bool:
    return other.adapter_for_fused_path() == adapter and has_one_layout([layer, other], adapter)


def prefetch_packed_weights(groups: list[ProjectionGroup]) -> list[GroupAdapter]:
    """Pack the weights of a whole model at once for the forward pass that begins.

    Without gradients nothing is packed. A layer that runs again, as under gradient checkpointing, packs its own
    weights. This is also where layers that FSDP2 has sharded are found: while one of them runs, its weights look like
    any others.

    Returns:
        The adapters whose weights were packed, for `drop_prefetched`.
    """
    may_be_sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    for group in groups:
        group.is_sharded = may_be_sharded and _are_sharded(group.layers)
    if not torch.is_grad_enabled():
        return []
    adapters = [a for group in groups for a in group.trained_adapters() if a.step is None]
    if adapters:
        from malora.fused.weight_cache import prefetch  # needs Triton

        prefetch(adapters)
    return adapters


def drop_prefetched(adapters: list[GroupAdapter]) -> None:
    """Drop packed weights that the forward pass did not use, because their layers did not run."""
    for adapter in adapters:
        adapter.prefetched = None


def _are_sharded(layers: list[FusedLayer]) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for layer in layers for parameter in layer.parameters())
