"""Gradients of routings under reentrant gradient checkpointing.

Reentrant checkpointing (`use_reentrant=True`) runs a layer twice: in the forward pass without gradients, and in the
backward pass with them. The balance loss is computed from the routing of the first run, but only the second run can
pass its gradient on to the router. So the gradient waits in between:

1. `defer_gradient` marks the routing of the first run. In the backward pass it puts the routing's gradient aside.
2. `add_gradient` hands it to the routing of the second run, together with the gradient of the layer's output.

The first step happens before the second, because autograd runs operations in the reverse order of the forward pass,
and the balance loss comes after all layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def defer_gradient(probability: Tensor, waiting: list[Tensor]) -> Tensor:
    """Return `probability`, whose gradient the backward pass will append to `waiting`."""
    anchor = torch.empty(0, requires_grad=True)  # an input that requires a gradient, so that backward is called
    deferred: Tensor = _DeferGradient.apply(probability, anchor, waiting)  # type: ignore[no-untyped-call]
    return deferred


def add_gradient(y: Tensor, probability: Tensor, gradient: Tensor) -> Tensor:
    """Return `y`, whose backward pass also gives `gradient` to `probability`."""
    joined: Tensor = _AddGradient.apply(y, probability, gradient)  # type: ignore[no-untyped-call]
    return joined


class _DeferGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probability: Tensor, anchor: Tensor, waiting: list[Tensor]) -> Tensor:
        ctx.waiting = waiting
        return probability.view_as(probability)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.waiting.append(gradients[0])
        return None, None, None


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, probability: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.saved_tensors[0], None
