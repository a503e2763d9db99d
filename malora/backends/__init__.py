"""Ways to compute one and the same sum over experts, `scaling · Σ_t g_t U_t D_t x`.

A backend is a function `(x_Tn, routing, factors, scaling) -> y_Tm`. The routing has a probability [T, N], and is None
where there is one expert and no router. Dropout has already been applied to `x`.

Shapes here and below: T tokens, n in, m out, N experts, r rank, d rank of the subspace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from malora.backends.dense import dense
from malora.backends.dispatch import dispatch
from malora.backends.grouped import grouped_gemm
from malora.backends.reference import reference
from malora.factors import Factors
from malora.routing import Routing


@dataclass(frozen=True)
class Backend:
    """A way to compute the sum over experts.

    Attributes:
        compute: `(x_Tn, routing, factors, scaling) -> y_Tm`.
        graph_safe: whether a CUDA graph can hold it. A backend that asks the device how many tokens each expert got
            makes the host wait, which a graph cannot.
        exact: whether it agrees with the others up to rounding of the input's dtype.
    """

    compute: Callable[[Tensor, Routing | None, Factors, float], Tensor]
    graph_safe: bool = True
    exact: bool = True


# "fused" and "fp8" compute whole layers, base and routers included (`malora.fused`). `compute` is what they fall back
# to where that path cannot run. "auto" stands for one of the others: see `malora.config.choose`.
BACKENDS: dict[str, Backend] = {
    "auto": Backend(dense),
    "dense": Backend(dense),
    "dispatch": Backend(dispatch, graph_safe=False),
    "fp8": Backend(dense, exact=False),
    "fused": Backend(dense),
    "reference": Backend(reference),
    "sorted": Backend(grouped_gemm),
}
