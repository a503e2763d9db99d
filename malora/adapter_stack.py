"""Adapters of one shape, stacked, so that one batched matmul serves all of them in a pass with `adapter_names`.

Training K adapters by themselves takes K times as many kernels as one, and most of these kernels are short. A stack
avoids this for adapters that differ in their values only, such as runs with other seeds or learning rates:

1. All trained values of an adapter lie in one flat parameter. The layers' parameters are views of it.
2. A pass copies the K flat parameters into one tensor, in the dtype of its matmuls. The layers read views [K, ...] of
   that copy.
3. The backward pass collects the gradients of these views in one tensor, whose K rows are the gradients of the flat
   parameters.

An optimizer, and the clipping of gradients, then handle one tensor per adapter.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from malora.config import MaloraConfig
from malora.factors import Factors, StackedWeights
from malora.layer import MaloraLayer

INPUT_KINDS = frozenset({"router", "A", "S"})  # they read the layer's input
OTHER_KINDS = ("P", "B", "Q", "S_B")
ALIGNMENT = 64  # elements; each tensor begins at a multiple of it, so that it is read in wide loads


class _Block(NamedTuple):
    """Where tensors of one kind lie in the flat values of an adapter, those of several layers one after the other."""

    layers: tuple[str, ...]
    kind: str  # "router", "A", "P", ...
    start: int
    shape: tuple[int, ...]  # of one layer's tensor

    @property
    def size(self) -> int:
        """Elements of all layers' tensors."""
        return len(self.layers) * math.prod(self.shape)

    def view(self, flat_KE: Tensor) -> Tensor:
        """Return the tensors of all adapters, [K, *shape], or [K, rows, n] if they read the layers' input."""
        found = flat_KE[:, self.start : self.start + self.size]
        return torch.unflatten(found, 1, (-1, self.shape[-1]) if self.kind in INPUT_KINDS else self.shape)

    def tensors(self, flat_E: Tensor) -> list[Tensor]:
        """Return the tensor of each layer, of one adapter."""
        found = flat_E[self.start : self.start + self.size]
        return [*found.view(len(self.layers), *self.shape)]


class AdapterStack(nn.Module):
    """The values of K adapters of one shape.

    The layers' parameters become views of `flat` and are no longer trained themselves. Move the model to its device
    and dtype before. `stack_adapters` makes stacks.

    Args:
        model: The model.
        names: Adapters for which `stack_adapters` would make one stack.

    Attributes:
        names: The adapters.
        flat: The trained values of each adapter, K parameters [E].
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        layers = [layer for layer in _layers(model) if names[0] in layer.settings]
        groups = _groups_of(layers, names[0])
        self._groups = [tuple(layer.name for layer in group) for group in groups]
        self._trained, trained = _move(groups, self.names, trained=True)
        self._frozen, frozen = _move(groups, self.names, trained=False)
        self.flat = nn.ParameterList(nn.Parameter(values) for values in trained)
        self._scales = _up_scales(layers[0], self.names, self._trained, trained)
        self._frozen_copies = {values.dtype: torch.stack(frozen) for values in frozen[:1]}
        by_name = {layer.name: layer for layer in layers}
        for block in self._trained:
            for name, values in zip(names, self.flat, strict=True):
                for layer_name, tensor in zip(block.layers, block.tensors(values.detach()), strict=True):
                    parameter = _tensors_of(by_name[layer_name], name)[block.kind]
                    parameter.requires_grad_(False)
                    parameter.data = tensor
        for layer in layers:
            layer.group.clear_caches()

    def weights(self, dtype: torch.dtype) -> dict[str, StackedWeights]:
        """Return the weights of all adapters in `dtype`, by the layer's name. Layers of a group share theirs.

        They carry gradients to `flat`. A matched scale of an adapter is in its up projections, so adapters of one stack
        may have scales of their own.
        """
        views: tuple[Tensor, ...] = _Unpack.apply(self._trained, dtype, self._scales, *self.flat)  # type: ignore[no-untyped-call]
        found = {(block.layers, block.kind): view for block, view in zip(self._trained, views, strict=True)}
        if self._frozen:
            if dtype not in self._frozen_copies:
                self._frozen_copies[dtype] = next(iter(self._frozen_copies.values())).to(dtype)
            found |= {(block.layers, block.kind): block.view(self._frozen_copies[dtype]) for block in self._frozen}
        by_layer: dict[str, StackedWeights] = {}
        for group in self._groups:
            down = found.get((group, "A"), found.get((group, "S")))
            assert down is not None, "every method has A or S"
            kinds = [{kind: found.get(((layer,), kind)) for kind in OTHER_KINDS} for layer in group]
            factors = [Factors(A=None, S=None, **of_layer) for of_layer in kinds]
            weights = StackedWeights(group, found.get((group, "router")), down, factors)
            by_layer |= dict.fromkeys(group, weights)
        return by_layer


class _Unpack(torch.autograd.Function):
    """Copy flat values of K adapters into one tensor and return views of its blocks.

    If there are scales, each value is multiplied by its own.
    """

    @staticmethod
    def forward(
        ctx: Any, blocks: list[_Block], dtype: torch.dtype, scales: list[Tensor] | None, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.scales, ctx.blocks, ctx.shape, ctx.dtype = scales, blocks, (len(flat), len(flat[0])), flat[0].dtype
        ctx.set_materialize_grads(False)
        copied = flat[0].new_empty(ctx.shape, dtype=dtype)
        sources = flat if scales is None else [source * scale for source, scale in zip(flat, scales, strict=True)]
        for target, source in zip(copied, sources, strict=True):
            target.copy_(source)
        return tuple(block.view(copied) for block in blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [
            (block, gradient) for block, gradient in zip(ctx.blocks, gradients, strict=True) if gradient is not None
        ]
        collected = found[0][1].new_zeros(ctx.shape, dtype=ctx.dtype)
        torch._foreach_copy_([block.view(collected) for block, _ in found], [gradient for _, gradient in found])
        if ctx.scales is not None:
            for gradient, scale in zip(collected, ctx.scales, strict=True):
                gradient.mul_(scale)
        return None, None, None, *collected.unbind()


def _up_scales(
    layer: MaloraLayer, names: Sequence[str], blocks: Sequence[_Block], like: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return the factor of each flat value [E] by which adapters' scales are matched; None if there are none.

    Args:
        layer: A layer with the adapters.
        names: The adapters.
        blocks: The blocks of the values.
        like: The values.
    """
    means = [layer.settings[name].mean_gate_sum for name in names]
    if not any(means):
        return None
    scales = [torch.ones_like(values) for values in like]
    for scale, mean in zip(scales, means, strict=True):
        for block in blocks:
            if block.kind in ("B", "Q"):  # one of the up projection's factors
                scale[block.start : block.start + block.size] = 1 / (mean or 1)
    return scales


def stack_adapters(model: nn.Module, names: Iterable[str]) -> list[AdapterStack]:
    """Stack adapters, those of one shape together.

    Adapters have one shape if they adapt the same layers with equal settings, and train the same factors. Initial
    values and weights of balance losses may differ.

    Args:
        model: Model with the adapters.
        names: Adapters; the stacks have them in this order.

    From then on, passes with `adapter_names` compute neighbouring rows of adapters of one stack together. The adapters
    must follow each other as in `names`, with equally many rows each. Other rows are computed adapter by adapter.

    Returns:
        The stacks. Their parameters are not the model's: give them to the optimizers, and to `capture_step` in a module
        with the model.
    """
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(_shape_of(model, name), []).append(name)
    stacks = [AdapterStack(model, members) for members in groups.values()]
    for layer in _layers(model):
        if (log := layer.routing_log) is not None:
            log.stacks = stacks
    return stacks


def _shape_of(model: nn.Module, name: str) -> Hashable:
    """Return what adapters must agree in to be stacked."""
    layers = [layer for layer in _layers(model) if name in layer.settings]
    return tuple(
        (
            layer.name,
            _settings_of(layer.settings[name]),
            *((kind, p.shape, p.dtype, p.requires_grad) for kind, p in _tensors_of(layer, name).items()),
        )
        for layer in layers
    )


def _settings_of(config: MaloraConfig) -> Hashable:
    scale = config.unmatched_scaling  # matched scales are in the copies of the weights
    gates = config.gating, config.num_experts, config.top_k, config.renormalize
    return *gates, scale, config.down, config.up, config.lora_dropout


def _layers(model: nn.Module) -> list[MaloraLayer]:
    return [module for module in model.modules() if isinstance(module, MaloraLayer)]


def _tensors_of(layer: MaloraLayer, name: str) -> dict[str, Tensor]:
    found = {"router": layer.router(name), **layer.factors(name)._asdict()}
    return {kind: tensor for kind, tensor in found.items() if tensor is not None}


def _groups_of(layers: list[MaloraLayer], name: str) -> list[list[MaloraLayer]]:
    """Divide layers into groups that read the same input and have equal settings."""
    groups: dict[Hashable, list[MaloraLayer]] = {}
    for layer in layers:
        shapes = tuple((kind, t.shape) for kind, t in _tensors_of(layer, name).items() if kind in INPUT_KINDS)
        groups.setdefault((id(layer.group), _settings_of(layer.settings[name]), shapes), []).append(layer)
    return [*groups.values()]


def _move(
    groups: list[list[MaloraLayer]], names: tuple[str, ...], *, trained: bool
) -> tuple[list[_Block], list[Tensor]]:
    """Copy tensors of adapters into flat ones, one per adapter.

    Args:
        groups: The layers with the adapters.
        names: The adapters.
        trained: Whether to take the trained tensors, or the frozen ones.

    Returns:
        The blocks, and the flat tensors [E]; no tensors if there are none to take.
    """
    blocks: list[_Block] = []
    start = 0
    for group in groups:
        for kind, tensor in _tensors_of(group[0], names[0]).items():
            if tensor.requires_grad is not trained:
                continue
            for together in [group] if kind in INPUT_KINDS else [[layer] for layer in group]:
                shape = tuple(_tensors_of(together[0], names[0])[kind].shape)
                blocks.append(_Block(tuple(layer.name for layer in together), kind, start, shape))
                start += -(-blocks[-1].size // ALIGNMENT) * ALIGNMENT
    if not blocks:
        return [], []
    by_name = {layer.name: layer for group in groups for layer in group}
    like = _tensors_of(groups[0][0], names[0])[blocks[0].kind]
    flat = [torch.zeros(start, dtype=like.dtype, device=like.device) for _ in names]
    for name, values in zip(names, flat, strict=True):
        for block in blocks:
            for layer, target in zip(block.layers, block.tensors(values), strict=True):
                target.copy_(_tensors_of(by_name[layer], name)[block.kind].detach())
    return blocks, flat
