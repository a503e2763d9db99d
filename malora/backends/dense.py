"""All experts at once, gated at rank width.

With N·r small, the experts side by side cost what a LoRA of rank N·r costs, and the gate is applied where the data is
narrowest: `y = B_cat (g ⊙ (A_cat x))`. No token is moved, nothing waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malora.factors import Factors
from malora.routing import Routing


def dense(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """See `malora.backends` for shapes."""
    h_TNr = _down(x_Tn, factors)
    if routing is None:
        h_TNr = h_TNr * scaling
    else:
        h_TNr = h_TNr * (routing.gate * scaling).to(h_TNr.dtype).unsqueeze(-1)
    return _up(h_TNr.flatten(1), factors)


def _down(x_Tn: Tensor, f: Factors) -> Tensor:
    if f.A is not None:
        return (x_Tn @ f.A.flatten(0, 1).T).unflatten(-1, f.A.shape[:2])
    if f.S.dim() == 2:
        return (x_Tn @ f.S.T @ f.P.flatten(0, 1).T).unflatten(-1, f.P.shape[:2])
    z_TNd = (x_Tn @ f.S.flatten(0, 1).T).unflatten(-1, f.S.shape[:2])
    return torch.einsum("tnd,nrd->tnr", z_TNd, f.P)


def _up(h_TNr: Tensor, f: Factors) -> Tensor:
    if f.B is not None:
        return h_TNr @ f.B.flatten(0, 1)
    return h_TNr @ f.Q.flatten(0, 1) @ f.S_B
