"""Backends: implementations of the expert sum `scaling · Σ_t g_t U_t D_t x`.

A backend is a pure function `(x_Tn, routing, factors, scaling) -> y_Tm`. Dropout has already been applied to x. The
probabilities of `routing` are [T, N]. `routing` is None if there is one expert and no router. The result has the
dtype of x and the factors, or that of autocast.

Suffixes of names are shapes:

| symbol | meaning |
| --- | --- |
| T | tokens |
| n, m | inputs and outputs of the linear layer |
| N | experts |
| r | rank of an expert |
| d | rank of the shared subspace |
| k | experts per token |
| K | assignments of tokens to experts, T·k |
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
    """Implementation of the expert sum.

    Attributes:
        compute: Function `(x_Tn, routing, factors, scaling) -> y_Tm`.
        graph_safe: Whether a CUDA graph can capture it. A backend that reads back how many tokens each expert got
            synchronises with the host, which a graph cannot do.
        exact: Whether it agrees with the other exact backends up to rounding in the dtype of the input.
    """

    compute: Callable[[Tensor, Routing | None, Factors, float], Tensor]
    graph_safe: bool = True
    exact: bool = True


# "fused" and "fp8" compute whole layers, including the frozen matmul and the router (`malora.fused`). Their `compute`
# is the fallback for layers and devices that `malora.fused` does not support. "auto" stands for one of the other
# backends; see `malora.config.resolve_backend`.
BACKENDS: dict[str, Backend] = {
    "auto": Backend(dense),
    "dense": Backend(dense),
    "dispatch": Backend(dispatch, graph_safe=False),
    "fp8": Backend(dense, exact=False),
    "fused": Backend(dense),
    "reference": Backend(reference),
    "sorted": Backend(grouped_gemm),
}
