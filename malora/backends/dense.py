"""All experts in one matmul, gated at rank width.

If N·r is small, all experts together cost as much as one LoRA of rank N·r. The gate is applied to the rank-r
activations, which are the smallest tensor of the layer:

    y = B_cat (g ⊙ (A_cat x))

No token is moved, and nothing synchronises with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malora.factors import Factors
from malora.routing import Routing


def dense(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """Compute the expert sum with all experts at once.

    See `malora.backends` for arguments and shapes.
    """
    h_TNr = _down_proj(x_Tn, factors)
    if routing is None:
        h_TNr = h_TNr * scaling
    else:
        h_TNr = h_TNr * (routing.gate * scaling).to(h_TNr.dtype).unsqueeze(-1)
    return _up_proj(h_TNr.flatten(1), factors)


def _down_proj(x_Tn: Tensor, factors: Factors) -> Tensor:
    """Compute D_t x of all experts: [T, N, r]."""
    if factors.A is not None:
        return _matmul_experts(x_Tn, factors.A)
    P, S = factors.subspace()
    if S.dim() == 2:
        return _matmul_experts(x_Tn @ S.T, P)
    return torch.einsum("tnd,nrd->tnr", _matmul_experts(x_Tn, S), P)


def _matmul_experts(x_Ti: Tensor, weight_Noi: Tensor) -> Tensor:
    """Multiply x by the matrix of every expert in one matmul: [T, N, o]."""
    return torch.unflatten(x_Ti @ weight_Noi.flatten(0, 1).T, -1, weight_Noi.shape[:2])


def _up_proj(h_TH: Tensor, factors: Factors) -> Tensor:
    """Compute Σ_t U_t h_t for the gated activations of all experts, [T, N·r]: [T, m]."""
    if factors.B is not None:
        return h_TH @ factors.B.flatten(0, 1)
    Q, S_B = factors.up_subspace()
    return h_TH @ Q.flatten(0, 1) @ S_B
