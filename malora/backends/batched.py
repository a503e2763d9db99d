"""The dense backend for several adapters of one shape at once, each on tokens of its own.

Every matmul is one batched matmul over the adapters. So the number of kernels does not grow with the adapters.

Suffixes are those of `malora.backends`, and K adapters. The factors have a first dimension K more than `Factors` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malora.factors import Factors


def batched_down_proj(x_KTn: Tensor, factors: Factors) -> Tensor:
    """Compute D_t x of all experts of each adapter: [K, T, N, r]."""
    if factors.A is not None:
        return _matmul_experts(x_KTn, factors.A)
    P, S = factors.subspace()
    if S.dim() == 3:
        return _matmul_experts(x_KTn @ S.mT, P)
    return torch.einsum("ktnd,knrd->ktnr", _matmul_experts(x_KTn, S), P)


def batched_up_proj(h_KTNr: Tensor, factors: Factors) -> Tensor:
    """Compute Σ_t U_t h_t from the gated activations of all experts of each adapter: [K, T, m]."""
    h_KTH = h_KTNr.flatten(2)
    if factors.B is not None:
        return h_KTH @ factors.B.flatten(1, 2)
    Q, S_B = factors.up_subspace()
    return h_KTH @ Q.flatten(1, 2) @ S_B


def _matmul_experts(x_KTi: Tensor, weight_KNoi: Tensor) -> Tensor:
    """Multiply x by the matrix of every expert of its adapter: [K, T, N, o]."""
    return torch.unflatten(x_KTi @ weight_KNoi.flatten(1, 2).mT, -1, weight_KNoi.shape[1:3])
