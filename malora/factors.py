"""Stacked expert matrices of one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


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
