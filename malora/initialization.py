"""How the experts start: the up side at zero, the down side as the paper's equations 8 to 10 say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from malora.factors import Factors


def init_factors_(factors: Factors, *, beta: float, same_start: bool) -> None:
    """Fill the factors of one layer in place, from torch's default generator.

    After it the layer's change is exactly zero: B = 0 (8), or S_B = 0 where the up side is decomposed, so that the
    shared matrix learns first and from all experts, as B does.
    """
    with torch.no_grad():
        if factors.A is not None:
            draw = kaiming_uniform(factors.A[:1].shape if same_start else factors.A.shape)
            factors.A.copy_(draw.expand_as(factors.A))
        else:
            _init_subspace_(factors.P, factors.S, beta)
        if factors.B is not None:
            factors.B.zero_()
        else:
            factors.Q.copy_(kaiming_uniform(factors.Q.shape))
            factors.S_B.zero_()


def kaiming_uniform(shape: torch.Size) -> Tensor:
    """Matrices [..., rows, n] with entries uniform in ±1/√n: Kaiming-uniform with a=√5, as PEFT starts LoRA's A."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound)


def _init_subspace_(P: Tensor, S: Tensor, beta: float) -> None:
    """Equations 8 to 10: K_t Kaiming-uniform, K_t = U_t Σ_t V_t, P_t = (U_t Σ_t)[:r] / β, S = β V_0.

    P_t S then has the norm of a Kaiming-uniform [r, n] matrix, whatever β is.

    The equations need d ≥ r rows. Where an expert's own subspace is narrower (the ablation without a shared S has
    d/N = 4 < r = 12), K_t gets r rows, the leading d of its directions are kept, and P_t is scaled up to K_t's norm.
    That reading is ours; the paper does not give one.
    """
    N, r, d = P.shape
    n = S.shape[-1]
    U, sigma, V = torch.linalg.svd(kaiming_uniform(torch.Size((N, max(r, d), n))), full_matrices=False)
    keep_norm = sigma.norm(dim=1) / sigma[:, :d].norm(dim=1)  # 1 where all directions are kept
    P.copy_((U * sigma[:, None, :])[:, :r, :d] * (keep_norm[:, None, None] / beta))
    S.copy_(beta * (V[0, :d] if S.dim() == 2 else V[:, :d]))
