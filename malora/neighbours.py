"""Frozen linear maps without an adapter, beside ones that have one: with `backend="fp8"` they are in 8 bits as well.

Of the paper's targets those are attention's outputs. Heads and embeddings are elsewhere, and stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from malora.config import MaloraConfig
    from malora.layer import MaloraLayer


class Neighbour(nn.Linear):
    """An `nn.Linear` that had its class exchanged: name, parameters and hooks are as before."""

    _adapted: tuple[MaloraLayer]  # in a tuple, or it would count as a part of this

    def forward(self, x: Tensor) -> Tensor:
        layer = self._adapted[0]
        adapter = layer.fused_adapter()
        y = self._in_8_bits(x) if adapter is not None and layer.settings[adapter].backend == "fp8" else None
        return super().forward(x) if y is None else y

    @torch.compiler.disable
    def _in_8_bits(self, x: Tensor) -> Tensor | None:
        from malora.backends import fp8  # it needs Triton, which is not everywhere

        if any(parameter.requires_grad for parameter in self.parameters()):
            return None
        backward = torch.is_grad_enabled() and x.requires_grad
        if (weight := fp8.frozen([self], self._adapted[0].siblings.frozen, backward)) is None:
            return None
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_Tn = x.to(dtype).flatten(0, -2).contiguous()
        return fp8.Alone.apply(x_Tn, self.bias, weight).unflatten(0, x.shape[:-1])


def find(model: nn.Module, layers: list[MaloraLayer], config: MaloraConfig) -> None:
    """Makes neighbours of the plain linear maps that share a parent with layers of an adapter in 8 bits."""
    if config.backend != "fp8":
        return
    trained = config.modules_to_save or []
    for parent, layer in {layer.name.rpartition(".")[0]: layer for layer in layers}.items():
        for name, module in model.get_submodule(parent).named_children():
            if type(module) is nn.Linear and name not in trained:
                module.__class__, module._adapted = Neighbour, (layer,)


def leave(module: nn.Module) -> None:
    """A plain `nn.Linear` again, if it is a neighbour."""
    if type(module) is Neighbour:
        module.__class__ = nn.Linear
        del module._adapted
