"""Tokens are carried to their experts: gather, a small product an expert, scatter.

What FastMoE, on which the paper ran, and today's public mixtures of LoRA experts do. The arithmetic is k/N of the dense
backend's; the price is data movement, N small products and a wait for the host, which must know how many tokens each
expert got. It is here to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malora.backends.dense import dense
from malora.factors import Factors
from malora.routing import Routing


def dispatch(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """See `malora.backends` for shapes."""
    if routing is None:
        return dense(x_Tn, None, factors, scaling)
    f, gate_TN = factors, routing.gate
    shares_S = f.S is not None and f.S.dim() == 2
    # The shared part of the down side is one product for all tokens; only its d-wide result travels.
    z = x_Tn @ f.S.T if shares_S else x_Tn
    down = f.P if shares_S else f.down()
    up = f.B if f.B is not None else f.Q

    # Rows of the transposed gate are experts, so the assignments come out grouped by expert.
    served_NT = gate_TN.T != 0
    expert, token = served_NT.nonzero(as_tuple=True)
    gate = gate_TN[token, expert].unsqueeze(-1) * scaling
    sizes = served_NT.sum(1).tolist()
    parts = zip(z[token].split(sizes), gate.split(sizes), down, up, strict=True)
    out = torch.cat([((z_e @ down_e.T) * gate_e.to(z_e.dtype)) @ up_e for z_e, gate_e, down_e, up_e in parts])
    y = out.new_zeros(len(x_Tn), out.shape[1]).index_add(0, token, out)
    return y if f.S_B is None else y @ f.S_B
