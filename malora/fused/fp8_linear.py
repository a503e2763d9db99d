"""Frozen linear maps without an adapter, beside ones that have one: with `backend="fp8"` they are in 8 bits as well.

They are every other `nn.Linear` of the same parent; with the paper's targets, attention's outputs. A head that is the
model's own child stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from malora.fused.availability import warn_once
from malora.fused.fp8_weights import Float8Weights
from malora.fused.tensor_utils import flat

if TYPE_CHECKING:
    from malora.layer import MaloraLayer
from malora.fused import fp8_linear


class Float8LinearFunction(torch.autograd.Function):
    """(x [T, n], bias or None, rounded weight of one frozen map) -> x Wᵀ + bias [T, m]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Float8Weights) -> Tensor:
        ctx.weight = weight
        return weight.outputs(x, [bias])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.weight.input_gradient(dy), None, None


class Float8Linear(nn.Linear):
    """An `nn.Linear` that had its class exchanged: name, parameters and hooks are as before."""

    # Layers with adapters. In a tuple, or they would count as parts of this; there only while it is a neighbour, since
    # who keeps its `forward` may call that later.
    _adapted: tuple[MaloraLayer, ...]

    def forward(self, input: Tensor) -> Tensor:
        for layer in vars(self).get("_adapted", ()):
            adapter = layer.adapter_for_fused_path()
            if adapter is not None and layer.settings[adapter].backend == "fp8":
                y = self._in_8_bits(input, layer)
                if y is not None:
                    return y
                break
        return nn.Linear.forward(self, input)

    @torch.compiler.disable
    def _in_8_bits(self, x: Tensor, layer: MaloraLayer) -> Tensor | None:
        from malora.fused import fp8_weights  # it needs Triton, which is not everywhere

        if any(parameter.requires_grad for parameter in self.parameters()):
            return None
        backward = torch.is_grad_enabled() and x.requires_grad
        if (weight := fp8_weights.frozen([self], layer.group.frozen, backward, instead="nn.Linear")) is None:
            return None
        return fp8_linear.Float8LinearFunction.apply(flat(x), self.bias, weight).view(*x.shape[:-1], self.out_features)


def convert_unadapted_linears(model: nn.Module, layers: list[MaloraLayer], adapter: str) -> None:
    """Makes neighbours of the plain linear maps that share a parent with layers of an adapter in 8 bits."""
    by_parent: dict[str, list[MaloraLayer]] = {}
    for layer in layers:
        by_parent.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    for parent, adapted in by_parent.items():
        in_8_bits = any(adapter in x.settings and x.settings[adapter].backend == "fp8" for x in adapted)
        for module in model.get_submodule(parent).children() if parent and in_8_bits else ():
            if type(module) not in (nn.Linear, Float8Linear):
                continue
            if "forward" in vars(module):  # accelerate's hooks hide the class's
                warn_once("fp8", "a frozen map whose forward was exchanged", "that")
                continue
            module.__class__, module._adapted = Float8Linear, tuple(adapted)


def restore_linear(module: nn.Module) -> None:
    """A plain `nn.Linear` again, if it is a neighbour."""
    for layer in vars(module).pop("_adapted", ()):
        layer.group.frozen.pop((id(module), 0), None)
    if type(module) is Float8Linear:
        module.__class__ = nn.Linear
