"""Assignments sorted by expert, then one grouped GEMM per projection.

The arithmetic grows with k·r and not with N·r. The cost is that every token is copied to k experts and back. Unlike
`dispatch`, nothing synchronises with the host: sizes of the groups stay on the GPU.

That holds for bfloat16 on Hopper or a later GPU. There `F.grouped_mm` reads the sizes on the GPU. With other dtypes
and on a CPU each group is a matmul of its own, and its size is read back.

Shapes are those of `malora.backends`; K = T·k assignments of tokens to experts. Suffix `_K` means sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from malora.backends.dense import dense
from malora.factors import Factors
from malora.routing import Routing


def grouped_gemm(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """Compute the expert sum by grouped GEMMs.

    See `malora.backends` for arguments and shapes.
    """
    if routing is None:
        return dense(x_Tn, None, factors, scaling)
    k, S, S_B = routing.top_k, factors.shared_S, factors.S_B
    expert_Tk = routing.experts
    gate_Tk = routing.gate_of(expert_Tk) * scaling
    keys = expert_Tk.flatten().to(torch.int16)  # short keys: a radix sort makes one pass per few bits of the key
    sorted_expert_K, order_K = keys.sort(stable=True)
    inverse_K = torch.empty_like(order_K).scatter_(0, order_K, torch.arange(len(order_K), device=order_K.device))
    experts_N = torch.arange(routing.probability.shape[1], dtype=torch.int16, device=order_K.device)
    ends_N = torch.searchsorted(sorted_expert_K, experts_N, right=True, out_int32=True)

    # The shared matrix is applied to all tokens in one matmul, so only its d outputs per token are moved.
    z = x_Tn if S is None else x_Tn @ S.T
    z_K = _copy_to_experts(z, order_K, inverse_K, k)
    gate_K1 = gate_Tk.flatten().index_select(0, order_K).unsqueeze(1)
    h_Kr = _grouped_matmul(z_K, factors.expert_down.transpose(1, 2), ends_N)
    out_K = _grouped_matmul(h_Kr * gate_K1.to(h_Kr.dtype), factors.expert_up, ends_N)
    y = _sum_over_experts(out_K, order_K, inverse_K, k)
    return y if S_B is None else y @ S_B


def _copy_to_experts(x_T: Tensor, order_K: Tensor, inverse_K: Tensor, k: int) -> Tensor:
    """Copy each token to its k assignments, sorted by expert: [T, i] to [K, i]."""
    x_K: Tensor = _CopyToExperts.apply(x_T, order_K, inverse_K, k)  # type: ignore[no-untyped-call]  # PyTorch's
    return x_K


def _sum_over_experts(y_K: Tensor, order_K: Tensor, inverse_K: Tensor, k: int) -> Tensor:
    """Sum the k assignments of each token: [K, j], sorted by expert, to [T, j]."""
    y_T: Tensor = _SumOverExperts.apply(y_K, order_K, inverse_K, k)  # type: ignore[no-untyped-call]  # PyTorch's
    return y_T


class _CopyToExperts(torch.autograd.Function):
    """Copy of tokens to assignments.

    Its gradient is `_SumOverExperts`, which needs no atomic additions.
    """

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, order_K: Tensor, inverse_K: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_K, inverse_K)
        ctx.k = k
        return x_T.index_select(0, order_K // k)

    @staticmethod
    def backward(ctx: Any, dx_K: Tensor) -> tuple[Tensor, None, None, None]:
        order_K, inverse_K = ctx.saved_tensors
        return _sum_over_experts(dx_K, order_K, inverse_K, ctx.k), None, None, None


class _SumOverExperts(torch.autograd.Function):
    """Sum assignments over the experts of a token. Its gradient is `_CopyToExperts`."""

    @staticmethod
    def forward(ctx: Any, y_K: Tensor, order_K: Tensor, inverse_K: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_K, inverse_K)
        ctx.k = k
        return torch.unflatten(y_K.index_select(0, inverse_K), 0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx: Any, dy_T: Tensor) -> tuple[Tensor, None, None, None]:
        order_K, inverse_K = ctx.saved_tensors
        return _copy_to_experts(dy_T, order_K, inverse_K, ctx.k), None, None, None


def _grouped_matmul(x_Ki: Tensor, weight_Nij: Tensor, ends_N: Tensor) -> Tensor:
    """Multiply the rows of each group by the group's matrix: [K, j].

    Args:
        x_Ki: Rows, sorted by group.
        weight_Nij: One matrix per group.
        ends_N: Index of the first row after each group, int32.
    """
    device = x_Ki.device.type
    if torch.is_autocast_enabled(device):  # autocast does not cast the operands of `grouped_mm`
        dtype = torch.get_autocast_dtype(device)
        x_Ki, weight_Nij = x_Ki.to(dtype), weight_Nij.to(dtype)
    if device == "cuda" and x_Ki.dtype == torch.bfloat16:
        # `grouped_mm` needs rows that start at multiples of 16 bytes, so sizes are padded with zeros to multiples of 8.
        i, j = (-size % 8 for size in weight_Nij.shape[1:])
        if i or j:  # F.pad copies even if there is nothing to pad
            padded = F.grouped_mm(F.pad(x_Ki, (0, i)), F.pad(weight_Nij, (0, j, 0, i)), offs=ends_N)
            return padded[:, : weight_Nij.shape[2]]
        return F.grouped_mm(x_Ki, weight_Nij, offs=ends_N)
    ends: list[int] = ends_N.tolist()
    groups = zip([0, *ends[:-1]], ends, weight_Nij, strict=True)
    return torch.cat([x_Ki[start:end] @ weight_ij for start, end, weight_ij in groups])
