"""Assignments sorted by expert once, one grouped product a side, nothing that waits for the host.

The sparse side as a good implementation has it: arithmetic grows with k·r and not with N·r, and what it costs instead
is carrying every token to k experts and back. Only in bfloat16 and from Hopper on does torch's grouped product leave
the host alone; otherwise each group is a product by itself.

Shapes: T tokens, n in, m out, N experts, r rank, k experts a token, K = T·k assignments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from malora.backends.dense import dense
from malora.factors import Factors
from malora.routing import Routing


def grouped_gemm(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """See `malora.backends` for shapes."""
    if routing is None:
        return dense(x_Tn, None, factors, scaling)
    f, k = factors, routing.top_k
    expert_Tk = routing.experts
    gate_Tk = routing.probability.gather(1, expert_Tk) * scaling
    narrow_K = expert_Tk.flatten().to(torch.int16)  # a radix sort goes over its keys once for every few of their bits
    sorted_expert_K, order_K = narrow_K.sort(stable=True)
    inverse_K = torch.empty_like(order_K).scatter_(0, order_K, torch.arange(len(order_K), device=order_K.device))
    experts_N = torch.arange(routing.probability.shape[1], dtype=torch.int16, device=order_K.device)
    ends_N = torch.searchsorted(sorted_expert_K, experts_N, right=True, out_int32=True)

    shares_S = f.S is not None and f.S.dim() == 2
    # The shared part of the down side is one product for all tokens; only its d-wide result travels.
    z = x_Tn @ f.S.T if shares_S else x_Tn
    z_K = _Scatter.apply(z, order_K, inverse_K, k)
    gate_K1 = gate_Tk.flatten().index_select(0, order_K).unsqueeze(1)
    h_Kr = _grouped(z_K, (f.P if shares_S else f.down()).transpose(1, 2), ends_N)
    out_K = _grouped(h_Kr * gate_K1.to(h_Kr.dtype), f.B if f.B is not None else f.Q, ends_N)
    y = _Gather.apply(out_K, order_K, inverse_K, k)
    return y if f.S_B is None else y @ f.S_B


class _Scatter(torch.autograd.Function):
    """Rows of tokens to rows of assignments. Its gradient is `_Gather`: a read in order, and no atomic addition."""

    @staticmethod
    def forward(ctx, x_T: Tensor, order_K: Tensor, inverse_K: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_K, inverse_K)
        ctx.k = k
        return x_T.index_select(0, order_K // k)

    @staticmethod
    def backward(ctx, gradient_K: Tensor):
        return _Gather.apply(gradient_K, *ctx.saved_tensors, ctx.k), None, None, None


class _Gather(torch.autograd.Function):
    """Rows of assignments summed to rows of tokens; its gradient is `_Scatter`."""

    @staticmethod
    def forward(ctx, y_K: Tensor, order_K: Tensor, inverse_K: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_K, inverse_K)
        ctx.k = k
        return y_K.index_select(0, inverse_K).unflatten(0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx, gradient_T: Tensor):
        return _Scatter.apply(gradient_T, *ctx.saved_tensors, ctx.k), None, None, None


def _grouped(x_Ki: Tensor, weight_Nij: Tensor, ends_N: Tensor) -> Tensor:
    """x of each group times the group's matrix: [K, j]. Group t ends before row `ends_N[t]`."""
    device = x_Ki.device.type
    if torch.is_autocast_enabled(device):  # grouped products are not among those that autocast narrows
        x_Ki, weight_Nij = (t.to(torch.get_autocast_dtype(device)) for t in (x_Ki, weight_Nij))
    if device == "cuda" and x_Ki.dtype == torch.bfloat16:
        # Rows must start at multiples of 16 bytes: a rank that is no multiple of 8 is filled up with zeros.
        i, j = (-size % 8 for size in weight_Nij.shape[1:])
        if i or j:  # F.pad copies even where there is nothing to add
            padded = F.grouped_mm(F.pad(x_Ki, (0, i)), F.pad(weight_Nij, (0, j, 0, i)), offs=ends_N)
            return padded[:, : weight_Nij.shape[2]]
        return F.grouped_mm(x_Ki, weight_Nij, offs=ends_N)
    ends = ends_N.tolist()
    parts = zip([0, *ends], ends, weight_Nij, strict=False)
    return torch.cat([x_Ki[start:end] @ weight_ij for start, end, weight_ij in parts])
