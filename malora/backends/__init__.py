"""Ways to compute one and the same sum over experts, `scaling · Σ_t g_t U_t D_t x`.

A backend is a function `(x_Tn, routing, factors, scaling) -> y_Tm`. The routing has a probability [T, N], and is None
where there is one expert and no router. Dropout has already been applied to `x`.

Shapes here and below: T tokens, n in, m out, N experts, r rank, d rank of the subspace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from malora.routing import Routing

if TYPE_CHECKING:
    from malora.config import MaloraConfig


class Factors(NamedTuple):
    """The experts of one layer, stacked. What a method does not have is None.

    Up-side factors are kept transposed, so that all experts side by side are a view and not a copy:
    `B.flatten(0, 1)` is the [N·r, m] matrix of one product for all of them.
    """

    A: Tensor | None  # [N, r, n]
    P: Tensor | None  # [N, r, d], or [N, r, d/N] with a subspace an expert
    S: Tensor | None  # [d, n] shared, or [N, d/N, n]
    B: Tensor | None  # [N, r, m]: B_t transposed
    Q: Tensor | None  # [N, r, d]: Q_t transposed
    S_B: Tensor | None  # [d, m]: S_B transposed

    @property
    def dtype(self) -> torch.dtype:
        return next(tensor.dtype for tensor in self if tensor is not None)

    def down(self) -> Tensor:
        """D_t of every expert, multiplied out: [N, r, n]."""
        return self.A if self.A is not None else self.P @ self.S

    def up(self) -> Tensor:
        """U_t of every expert, transposed and multiplied out: [N, r, m]."""
        return self.B if self.B is not None else self.Q @ self.S_B

    def delta_weight(self, scaling: float) -> Tensor:
        """Σ_t U_t D_t · scaling: [m, n]. The layer's whole change where there is no router."""
        return scaling * (self.up().flatten(0, 1).T @ self.down().flatten(0, 1))


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Autocast's where that is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def flat(x: Tensor) -> Tensor:
    """x [..., n] as products read it: [T, n], contiguous, in their dtype."""
    return x.to(dtype_of_products(x)).reshape(-1, x.shape[-1]).contiguous()


def is_captured(like: Tensor) -> bool:
    """Whether what runs now on the tensor's device becomes a CUDA graph: it has no values until that is replayed."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


Backend = Callable[[Tensor, Routing | None, Factors, float], Tensor]

from malora.backends.dense import dense  # noqa: E402  (they need Factors)
from malora.backends.dispatch import dispatch  # noqa: E402
from malora.backends.reference import reference  # noqa: E402
from malora.backends.sorted import sorted_dispatch  # noqa: E402

# "fused" computes whole layers, base and routers included (malora/siblings.py), and "fp8" does so with base and
# up sides in 8 bits; the function here is what they do where that cannot run. "auto" takes one of them: see `choose`.
BACKENDS: dict[str, Backend] = {
    "auto": dense,
    "dense": dense,
    "dispatch": dispatch,
    "fp8": dense,
    "fused": dense,
    "reference": reference,
    "sorted": sorted_dispatch,
}

# They ask the device how many tokens an expert got, so they cannot be captured in a CUDA graph.
WAIT_FOR_THE_HOST = frozenset({"dispatch"})

# They round more than the others, so their results and speeds do not stand for their method's.
INEXACT = frozenset({"fp8"})

# What carrying a token to an expert and back costs, in ranks that it could be multiplied by meanwhile. On an H100,
# sparse work was behind up to the largest N·r tried, 2,048 with k = 2; this is where both would meet (docs/speed.md).
RANKS_TO_CARRY = 2048


def choose(config: MaloraConfig, device: torch.device) -> str:
    """The backend that a config means: its own, or for "auto" the one expected to be fastest on the device.

    Side by side, experts cost N·r a token; sorted, k·r and the carrying, `RANKS_TO_CARRY`. A CPU stays dense. GPUs
    before Hopper stay fused: torch's grouped product waits for the host there, so a CUDA graph could not hold it.
    """
    if config.backend != "auto":
        return config.backend
    if device.type != "cuda":
        return "dense"
    is_sparse = config.num_experts * config.r > config.top_k * (config.r + RANKS_TO_CARRY)
    return "sorted" if is_sparse and torch.cuda.get_device_properties(device).major >= 9 else "fused"
