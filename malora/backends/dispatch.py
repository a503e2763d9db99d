"""Token dispatch, with one small matmul per expert.

It gathers the tokens of each expert, runs one small matmul per expert, and scatters the results.

FastMoE, which the paper used, and current public mixtures of LoRA experts work like this. The arithmetic is k/N of
the dense backend's. The cost is data movement, N small matmuls, and a host synchronisation to learn how many tokens
each expert got. This backend is a baseline for comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malora.backends.dense import dense
from malora.factors import Factors
from malora.routing import Routing


def dispatch(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """Compute the expert sum by dispatch.

    See `malora.backends` for arguments and shapes.
    """
    if routing is None:
        return dense(x_Tn, None, factors, scaling)
    S, S_B, gate_TN = factors.shared_S, factors.S_B, routing.gate
    # The shared matrix is applied to all tokens in one matmul, so only its d outputs per token are moved.
    z = x_Tn if S is None else x_Tn @ S.T

    # Row t of the transposed gate belongs to expert t, so `nonzero` returns the assignments sorted by expert.
    used_NT = gate_TN.T != 0
    expert_K, token_K = used_NT.nonzero(as_tuple=True)
    gate_K1 = gate_TN[token_K, expert_K].unsqueeze(-1) * scaling
    sizes_N: list[int] = used_NT.sum(1).tolist()
    z_per_expert, gate_per_expert = torch.split(z[token_K], sizes_N), torch.split(gate_K1, sizes_N)
    work = zip(z_per_expert, gate_per_expert, factors.expert_down, factors.expert_up, strict=True)
    out = torch.cat([((z_e @ down_e.T) * gate_e.to(z_e.dtype)) @ up_e for z_e, gate_e, down_e, up_e in work])
    y = out.new_zeros(len(x_Tn), out.shape[1]).index_add(0, token_K, out)
    return y if S_B is None else y @ S_B
