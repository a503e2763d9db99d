"""Routing and gating of experts by the kernels of the fused path, with gradients, for experts computed elsewhere.

The torch operations that do the same are some twenty kernels per layer. Here they are one in each direction.

Shapes: T tokens, N experts, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.fused.kernels.gate import GateLayout, gate, gate_backward


def gate_experts(expert_out_TNr: Tensor, logits_TN: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Multiply each expert's output by its gate and the scaling.

    Args:
        expert_out_TNr: Outputs of the down projections.
        logits_TN: Router logits, in the same dtype.
        top_k: Experts per token.
        scaling: Factor of all gates.

    Returns:
        The gated outputs, [T, N, r], and the router probabilities, [T, N] in float32 or wider.
    """
    _, N, r = expert_out_TNr.shape
    H = N * r
    layout = GateLayout(
        N=N, top_k=top_k, r=r, D=r, z_step=r, z_group=H, l_group=N, logits_at=H, has_p=False, scaling=scaling
    )
    h, probability = _GateExperts.apply(expert_out_TNr.flatten(1), logits_TN, layout)  # type: ignore[no-untyped-call]
    return torch.unflatten(h, 1, (N, r)), probability


class _GateExperts(torch.autograd.Function):
    """Gate the columns of expert outputs [T, N·r] by router logits [T, N]."""

    @staticmethod
    def forward(ctx: Any, expert_out: Tensor, logits: Tensor, layout: GateLayout) -> tuple[Tensor, Tensor]:
        down_out = torch.cat([expert_out, logits], 1)
        h = expert_out.new_empty(1, *expert_out.shape)
        probability = gate(down_out, None, h, layout)
        ctx.layout = layout
        ctx.save_for_backward(down_out)
        ctx.set_materialize_grads(False)
        return h[0], probability[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, d_probability: Tensor | None) -> tuple[Tensor, Tensor, None]:
        (down_out,) = ctx.saved_tensors
        layout: GateLayout = ctx.layout
        dh = down_out.new_zeros(len(down_out), layout.logits_at) if dh is None else dh
        if d_probability is not None:
            d_probability = d_probability.contiguous()[None]
        gradient = torch.empty_like(down_out)
        gate_backward(down_out, None, dh.contiguous()[None], d_probability, gradient, layout)
        return gradient[:, : layout.logits_at], gradient[:, layout.logits_at :], None
