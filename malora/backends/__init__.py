"""Ways to compute one and the same sum over experts, `scaling · Σ_t g_t U_t D_t x`.

A backend is a function `(x_Tn, routing, factors, scaling) -> y_Tm`. The routing has a probability [T, N], and is None
where there is one expert and no router. Dropout has already been applied to `x`.

Shapes here and below: T tokens, n in, m out, N experts, r rank, d rank of the subspace.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from malora.backends.dense import dense
from malora.backends.dispatch import dispatch
from malora.backends.grouped import grouped_gemm
from malora.backends.reference import reference
from malora.factors import Factors
from malora.routing import Routing

Backend = Callable[[Tensor, Routing | None, Factors, float], Tensor]
# "fused" computes whole layers, base and routers included (malora/siblings.py), and "fp8" does so with base and
# up sides in 8 bits; the function here is what they do where that cannot run. "auto" takes one of them: see `choose`.
BACKENDS: dict[str, Backend] = {
    "auto": dense,
    "dense": dense,
    "dispatch": dispatch,
    "fp8": dense,
    "fused": dense,
    "reference": reference,
    "sorted": grouped_gemm,
}
# They ask the device how many tokens an expert got, so they cannot be captured in a CUDA graph.
WAIT_FOR_THE_HOST = frozenset({"dispatch"})
# They round more than the others, so their results and speeds do not stand for their method's.
INEXACT = frozenset({"fp8"})
