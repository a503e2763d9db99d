"""The dense backend for several adapters of one shape at once, each on tokens of its own.

Every matmul is one batched matmul over the adapters. So the number of kernels does not grow with the adapters. Layers
that read the same input share the matmul that reads it.

Suffixes are those of `malora.backends`, with K adapters and G layers. Factors have K as a first dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malora.factors import Factors


def batched_down_proj(x_KTn: Tensor, down_KRn: Tensor, factors: list[Factors], experts: int) -> list[Tensor]:
    """Compute D_t x of all experts of each adapter, [K, T, N, r] for each layer.

    Args:
        x_KTn: Input of the layers.
        down_KRn: A or S of all layers, one below the other, [K, G·R, n].
        factors: The other factors of each layer.
        experts: N.
    """
    z_KTR = (x_KTn @ down_KRn.mT).chunk(len(factors), -1)
    return [_expert_outputs(z, of_layer, experts) for z, of_layer in zip(z_KTR, factors, strict=True)]


def _expert_outputs(z_KTR: Tensor, factors: Factors, experts: int) -> Tensor:
    P = factors.P
    if P is None:
        return torch.unflatten(z_KTR, -1, (experts, -1))
    if P.shape[-1] == z_KTR.shape[-1]:
        return torch.unflatten(z_KTR @ P.flatten(1, 2).mT, -1, P.shape[1:3])
    return torch.einsum("ktnd,knrd->ktnr", torch.unflatten(z_KTR, -1, (experts, -1)), P)


def batched_up_proj(h_KTH: Tensor, factors: Factors) -> Tensor:
    """Compute Σ_t U_t h_t from the gated activations of all experts of each adapter, [K, T, N·r]: [K, T, m]."""
    if factors.B is not None:
        return h_KTH @ factors.B.flatten(1, 2)
    Q, S_B = factors.up_subspace()
    return h_KTH @ Q.flatten(1, 2) @ S_B
