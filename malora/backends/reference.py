"""The paper's equations as a loop over experts. Slow and plain: the oracle that other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from malora.factors import Factors
from malora.routing import Routing


def reference(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """Equation 5, one expert after the other; see `malora.backends` for shapes."""
    gate_TN = torch.ones_like(x_Tn[:, :1]) if routing is None else routing.gate
    y_Tm = 0
    for t, (down_rn, up_rm) in enumerate(zip(factors.down(), factors.up(), strict=True)):
        y_Tm = y_Tm + scaling * gate_TN[:, t : t + 1] * (x_Tn @ down_rn.T @ up_rm)
    return y_Tm
