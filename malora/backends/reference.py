"""The paper's equations as a loop over experts. Slow and plain: the oracle that other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from malora.backends import Factors


def reference(x_Tn: Tensor, gate_TN: Tensor | None, factors: Factors, scaling: float) -> Tensor:
    """Equation 5, one expert after the other; see `malora.backends` for shapes."""
    y_Tm = 0
    for t, (down_rn, up_rm) in enumerate(zip(factors.down(), factors.up(), strict=True)):
        gate_T1 = torch.ones_like(x_Tn[:, :1]) if gate_TN is None else gate_TN[:, t : t + 1]
        y_Tm = y_Tm + scaling * gate_T1 * (x_Tn @ down_rn.T @ up_rm)
    return y_Tm
