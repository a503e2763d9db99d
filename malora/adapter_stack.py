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

ALIGNMENT = 64  # elements; each tensor begins at a multiple of it, so that it is read in wide loads


class _Place(NamedTuple):
    """Where a tensor of a layer lies in the flat values of an adapter."""

    layer: str
    kind: str  # "router", "A", "P", ...
    start: int
    shape: tuple[int, ...]

    def view(self, flat_KE: Tensor) -> Tensor:
        """Return this tensor of all adapters, [K, *shape]."""
        return torch.unflatten(flat_KE[:, self.start : self.start + math.prod(self.shape)], 1, self.shape)


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
        self._trained, trained = _move(layers, self.names, trained=True)
        self._frozen, frozen = _move(layers, self.names, trained=False)
        self.flat = nn.ParameterList(nn.Parameter(values) for values in trained)
        self._frozen_copies = {values.dtype: torch.stack(frozen) for values in frozen[:1]}
        by_name = {layer.name: layer for layer in layers}
        for place in self._trained:
            for name, values in zip(names, self.flat, strict=True):
                parameter = _tensors_of(by_name[place.layer], name)[place.kind]
                parameter.requires_grad_(False)
                parameter.data = place.view(values.detach()[None])[0]
        for layer in layers:
            layer.group.clear_caches()

    def weights(self, dtype: torch.dtype) -> dict[str, StackedWeights]:
        """Return the weights of all adapters in `dtype`, by the layer's name.

        They carry gradients to `flat`.
        """
        views: tuple[Tensor, ...] = _Unpack.apply(self._trained, dtype, *self.flat)  # type: ignore[no-untyped-call]
        found: dict[str, dict[str, Tensor]] = {}
        for place, view in zip(self._trained, views, strict=True):
            found.setdefault(place.layer, {})[place.kind] = view
        if self._frozen:
            original = next(iter(self._frozen_copies.values()))
            if dtype not in self._frozen_copies:
                self._frozen_copies[dtype] = original.to(dtype)
            for place in self._frozen:
                found.setdefault(place.layer, {})[place.kind] = place.view(self._frozen_copies[dtype])
        empty = dict.fromkeys(Factors._fields)
        return {
            layer: StackedWeights(tensors.pop("router", None), Factors(**{**empty, **tensors}))
            for layer, tensors in found.items()
        }


class _Unpack(torch.autograd.Function):
    """Copy flat values of K adapters into one tensor and return the views [K, ...] of it at some places."""

    @staticmethod
    def forward(ctx: Any, places: list[_Place], dtype: torch.dtype, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.places, ctx.shape, ctx.dtype = places, (len(flat), len(flat[0])), flat[0].dtype
        ctx.set_materialize_grads(False)
        copied = flat[0].new_empty(ctx.shape, dtype=dtype)
        for target, source in zip(copied, flat, strict=True):
            target.copy_(source)
        return tuple(place.view(copied) for place in places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [(p, gradient) for p, gradient in zip(ctx.places, gradients, strict=True) if gradient is not None]
        collected = found[0][1].new_zeros(ctx.shape, dtype=ctx.dtype)
        torch._foreach_copy_([place.view(collected) for place, _ in found], [gradient for _, gradient in found])
        return None, None, *collected.unbind()


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
    return config.num_experts, config.top_k, config.scaling, config.down, config.up, config.lora_dropout


def _layers(model: nn.Module) -> list[MaloraLayer]:
    return [module for module in model.modules() if isinstance(module, MaloraLayer)]


def _tensors_of(layer: MaloraLayer, name: str) -> dict[str, Tensor]:
    found = {"router": layer.router(name), **layer.factors(name)._asdict()}
    return {kind: tensor for kind, tensor in found.items() if tensor is not None}


def _move(layers: list[MaloraLayer], names: tuple[str, ...], *, trained: bool) -> tuple[list[_Place], list[Tensor]]:
    """Copy tensors of adapters into flat ones, one per adapter.

    Args:
        layers: The layers with the adapters.
        names: The adapters.
        trained: Whether to take the trained tensors, or the frozen ones.

    Returns:
        The place of each tensor, and the flat tensors [E]; no tensors if there are none to take.
    """
    places, start = [], 0
    for layer in layers:
        for kind, tensor in _tensors_of(layer, names[0]).items():
            if tensor.requires_grad is trained:
                places.append(_Place(layer.name, kind, start, tuple(tensor.shape)))
                start += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    if not places:
        return [], []
    by_name = {layer.name: layer for layer in layers}
    like = _tensors_of(by_name[places[0].layer], names[0])[places[0].kind]
    flat = [torch.zeros(start, dtype=like.dtype, device=like.device) for _ in names]
    for name, values in zip(names, flat, strict=True):
        for place in places:
            place.view(values[None])[0].copy_(_tensors_of(by_name[place.layer], name)[place.kind].detach())
    return places, flat
