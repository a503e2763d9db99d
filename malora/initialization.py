"""Initialization of the experts: equations 8 to 10 of the paper.

The up projections start at zero, so a new adapter does not change the model. The down projections start random.
Shapes are those of `malora.factors`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from malora.factors import Factors


def init_factors_(factors: Factors, *, beta: float, same_start: bool, has_effect: bool = False) -> None:
    """Initialize the factors of one layer in place.

    The random numbers come from PyTorch's default random generator.

    The layer's change is exactly zero afterwards, unless `has_effect`: B = 0 (equation 8). If the up projections are
    `S_B Q_t`, then S_B = 0. The shared matrix then learns first, and from all experts, as B does.

    Args:
        factors: Factors to write to.
        beta: β of equation 10. It scales S, and its inverse scales P_t.
        same_start: Whether all A_t start as the same random matrix.
        has_effect: Whether B, or S_B, starts random instead of zero, uniform in ±1/√r or ±1/√d.
    """
    with torch.no_grad():
        if factors.A is not None:
            draw = kaiming_uniform(factors.A[:1].shape if same_start else factors.A.shape)
            factors.A.copy_(draw.expand_as(factors.A))
        else:
            _init_subspace_(*factors.subspace(), beta)
        if factors.B is not None:
            factors.B.zero_()
        else:
            Q, S_B = factors.up_subspace()
            Q.copy_(kaiming_uniform(Q.shape))
            S_B.zero_()
        if has_effect:
            last = factors.up_subspace()[1] if factors.B is None else factors.B
            last.copy_(kaiming_uniform(last.mT.shape).mT)


def kaiming_uniform(shape: torch.Size) -> Tensor:
    """Draw float32 matrices [..., n] with entries uniform in ±1/√n.

    This is Kaiming-uniform with a = √5, the initialization of LoRA's A in PEFT.
    """
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound)


def _init_subspace_(P: Tensor, S: Tensor, beta: float) -> None:
    """Initialize P and S in place by equations 8 to 10.

        K_t Kaiming-uniform, K_t = U_t Σ_t V_t, P_t = (U_t Σ_t)[:r] / β, S = β V_0

    P_t S then has the norm of a Kaiming-uniform [r, n] matrix for every β.

    The equations assume d ≥ r. Without a shared S an expert has only d/N = 4 < r = 12 dimensions. There we draw K_t
    with r rows, keep its leading directions, and scale P_t up to the norm of K_t. The paper does not describe this
    case; this reading is ours.
    """
    N, r, d = P.shape
    n = S.shape[-1]
    U, sigma, V = torch.linalg.svd(kaiming_uniform(torch.Size((N, max(r, d), n))), full_matrices=False)
    keep_norm = sigma.norm(dim=1) / sigma[:, :d].norm(dim=1)  # 1 if all directions are kept
    P.copy_((U * sigma[:, None, :])[:, :r, :d] * (keep_norm[:, None, None] / beta))
    S.copy_(beta * (V[0, :d] if S.dim() == 2 else V[:, :d]))
