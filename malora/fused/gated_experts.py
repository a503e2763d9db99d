"""Routing and gating of experts by the kernels of the fused path, with gradients, for experts computed elsewhere.

The torch operations that do the same are some twenty kernels per layer. Here they are two for all layers that share an
input, and in the backward pass, too: one brings the operands together, the other computes.

Shapes: K adapters, T tokens of each, N experts, r rank, H = N·r; G layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.config import MaloraConfig
from malora.fused.kernels.gate import GateLayout, gate, gate_backward


def gate_experts(outputs: list[Tensor], logits: Tensor, config: MaloraConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Multiply each expert's output by its gate and the scaling.

    Args:
        outputs: Outputs of the down projections of each layer, [K, T, N, r].
        logits: Router logits of all layers, [K, T, G·N], in the same dtype.
        config: Settings of the adapters. A matched scale is in their weights (`AdapterStack.weights`).

    Returns:
        Of each layer the gated outputs, [K, T, H], and the router probabilities, [K, T, N] in float32 or wider.
    """
    G = len(outputs)
    N, r = outputs[0].shape[2:]
    H = N * r
    layout = GateLayout(
        N=N, top_k=config.top_k, r=r, D=r, z_step=r, z_group=H, l_group=N, logits_at=G * H, has_p=False,
        scaling=config.unmatched_scaling, renormalize=config.renormalize,
    )  # fmt: skip
    results = _GateExperts.apply(layout, logits, *(output.flatten(2) for output in outputs))  # type: ignore[no-untyped-call]
    return [*results[:G]], [*results[G:]]


class _GateExperts(torch.autograd.Function):
    """Gate the columns of the expert outputs of each layer, [K, T, H], by router logits [K, T, G·N]."""

    @staticmethod
    def forward(ctx: Any, layout: GateLayout, logits: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        down_out = torch.cat([*outputs, logits], -1).flatten(0, 1)
        shape = outputs[0].shape
        h = logits.new_empty(len(outputs), len(down_out), shape[-1])
        probabilities = gate(down_out, None, h, layout)
        ctx.layout, ctx.shape = layout, shape
        ctx.save_for_backward(down_out)
        ctx.set_materialize_grads(False)
        return *(one.view(shape) for one in h), *(one.view(*shape[:2], layout.N) for one in probabilities)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (down_out,) = ctx.saved_tensors
        layout: GateLayout = ctx.layout
        (K, T, H), G, N = ctx.shape, len(gradients) // 2, layout.N
        dh = _stack(gradients[:G], (K, T, H), down_out)
        d_probability = None
        if any(gradient is not None for gradient in gradients[G:]):
            wide = down_out.new_empty(0, dtype=torch.promote_types(down_out.dtype, torch.float32))
            d_probability = _stack(gradients[G:], (K, T, N), wide)
        d_down_out = torch.empty_like(down_out)
        gate_backward(down_out, None, dh, d_probability, d_down_out, layout)
        *d_outputs, d_logits = d_down_out.view(K, T, -1).split([H] * G + [G * N], -1)
        return None, d_logits, *d_outputs


def _stack(gradients: tuple[Tensor | None, ...], shape: tuple[int, int, int], like: Tensor) -> Tensor:
    """Return the gradients [K, T, C] of all layers as [G, K·T, C]; zeros where there is none."""
    found = [like.new_zeros(shape) if gradient is None else gradient for gradient in gradients]
    stacked = torch.stack(found) if len(found) > 1 else found[0].contiguous()[None]
    return stacked.flatten(1, 2)
