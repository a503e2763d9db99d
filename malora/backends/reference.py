"""Equation 5 as a loop over experts.

It is slow and simple; the tests compare all other backends with it.
"""

from __future__ import annotations

from torch import Tensor

from malora.factors import Factors
from malora.routing import Routing


def reference(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """Compute the expert sum one expert after the other.

    See `malora.backends` for arguments and shapes.
    """
    gate_TN = x_Tn.new_ones(len(x_Tn), len(factors.expert_up)) if routing is None else routing.gate
    y_Tm = x_Tn.new_zeros(())
    for t, (down_rn, up_rm) in enumerate(zip(factors.down(), factors.up(), strict=True)):
        y_Tm = y_Tm + scaling * gate_TN[:, t : t + 1] * (x_Tn @ down_rn.T @ up_rm)
    return y_Tm
