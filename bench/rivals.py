"""The sparse ways to compute a mixture of LoRA experts that a user could take instead; written to be compared with.

`loop` is what public code does, `sorted_dispatch` what a good implementation would do. Both are backends as
`malora.backends` has them; they are known to the tuner only inside `registered()`, that is in the profiler.

Shapes: T tokens, n in, m out, N experts, r rank, k experts a token, K = T·k assignments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from malora import BACKENDS
from malora.backends import Backend, Factors

TOP_K = (1, 2, 4, 8)  # for each of them `sorted-topK` exists: a CUDA graph needs K to be known to the host


@contextmanager
def registered() -> Iterator[None]:
    """Inside it, MaloraConfig(backend=...) takes "loop" and "sorted-topK" too."""
    rivals: dict[str, Backend] = {"loop": loop}
    rivals |= {f"sorted-top{k}": partial(sorted_dispatch, top_k=k) for k in TOP_K}
    BACKENDS.update(rivals)
    try:
        yield
    finally:
        for name in rivals:
            del BACKENDS[name]


def loop(x_Tn: Tensor, gate_TN: Tensor | None, factors: Factors, scaling: float) -> Tensor:
    """Expert by expert: find its tokens, gather them, apply its LoRA, weigh, add into the output.

    The behaviour of `MolaSparseMoe.forward` in TUDB-Labs/MoE-PEFT, moe_peft/adapters/mola/model.py at commit
    8115bbfce551f6e026f522b28117f985a02b10d7, which, as the paper's MoLoRA does, routes at every linear map. The same
    loop stands in MixLoRA and in the mixtures that follow it. Each `torch.where` makes the host wait for the device.
    It runs here in the precision of all the others, where the original widens its activations to float32; and it takes
    the gate of equation 4, which is not renormalised.
    """
    if gate_TN is None:
        gate_TN = torch.ones_like(x_Tn[:, :1])
    y_Tm = None
    for t, (down_rn, up_rm) in enumerate(zip(factors.down(), factors.up(), strict=True)):
        (token,) = torch.where(gate_TN[:, t] != 0)
        out = (x_Tn[token] @ down_rn.T @ up_rm) * scaling
        if y_Tm is None:
            y_Tm = out.new_zeros(len(x_Tn), out.shape[1])
        y_Tm.index_add_(0, token, out * gate_TN[token, t, None].to(out.dtype))
    return y_Tm


def sorted_dispatch(
    x_Tn: Tensor, gate_TN: Tensor | None, factors: Factors, scaling: float, *, top_k: int = 2
) -> Tensor:
    """Assignments sorted by expert once, one grouped product a side, nothing that waits for the host.

    The router's choice is taken from the gate again by a top-k over [T, N], since a backend is given the gate alone; an
    implementation with the router inside would save that pass. Shared factors are one product for all tokens, as in
    the dispatch backend.
    """
    if gate_TN is None:
        gate_TN = torch.ones_like(x_Tn[:, :1])
    f = factors
    k = min(top_k, gate_TN.shape[1])
    gate_Tk, expert_Tk = gate_TN.topk(k, dim=1)
    sorted_expert_K, order_K = expert_Tk.flatten().sort(stable=True)
    inverse_K = torch.empty_like(order_K).scatter_(0, order_K, torch.arange(len(order_K), device=order_K.device))
    experts = torch.arange(gate_TN.shape[1], device=order_K.device)
    ends_N = torch.searchsorted(sorted_expert_K, experts, right=True, out_int32=True)

    shares_S = f.S is not None and f.S.dim() == 2
    z = x_Tn @ f.S.T if shares_S else x_Tn
    z_K = _Scatter.apply(z, order_K, inverse_K, k)
    gate_K1 = (gate_Tk * scaling).flatten().index_select(0, order_K).unsqueeze(1)
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
