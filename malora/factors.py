"""Stacked expert matrices of one layer.

The layer computes `y = W x + scaling · Σ_t g_t U_t D_t x`. D_t is the down projection of expert t and U_t its up
projection. Each is either a matrix of its own or a product with a shared matrix:

    D_t = A_t, P_t S or P_t S_t
    U_t = B_t or S_B Q_t

| symbol | meaning |
| --- | --- |
| n, m | inputs and outputs of the linear layer |
| N | experts |
| r | rank of an expert |
| d | rank of the shared subspace |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Expert matrices of one layer, stacked over the experts.

    A factor that the method does not have is None.

    The up projections are stored transposed. `B.flatten(0, 1)` is then a view, [N·r, m], and one matmul with it
    applies all experts.

    Attributes:
        A: Down projections A_t, [N, r, n].
        P: Coefficients P_t, [N, r, d], or [N, r, d/N] if each expert has a subspace of its own.
        S: Subspace of the down projections: [d, n] if shared, [N, d/N, n] if each expert has its own.
        B: Up projections, [N, r, m]: B_t transposed.
        Q: Coefficients, [N, r, d]: Q_t transposed.
        S_B: Shared subspace of the up projections, [d, m]: S_B transposed.
    """

    A: Tensor | None
    P: Tensor | None
    S: Tensor | None
    B: Tensor | None
    Q: Tensor | None
    S_B: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return next(tensor.dtype for tensor in self if tensor is not None)

    @property
    def shared_S(self) -> Tensor | None:
        """S if all experts share it, [d, n]; None otherwise."""
        return self.S if self.S is not None and self.S.dim() == 2 else None

    @property
    def expert_down(self) -> Tensor:
        """Down projection of each expert after the shared S, if there is one.

        It is [N, r, d] if there is a shared S, otherwise [N, r, n].
        """
        return self.down() if self.shared_S is None else self.subspace()[0]

    @property
    def expert_up(self) -> Tensor:
        """Transposed up projection of each expert before the shared S_B, if there is one.

        It is [N, r, d] if there is a shared S_B, otherwise [N, r, m].
        """
        return self.up_subspace()[0] if self.B is None else self.B

    def subspace(self) -> tuple[Tensor, Tensor]:
        """Return P and S of a method whose down projections are `P_t S` or `P_t S_t`."""
        assert self.P is not None and self.S is not None
        return self.P, self.S

    def up_subspace(self) -> tuple[Tensor, Tensor]:
        """Return Q and S_B of a method whose up projections are `S_B Q_t`."""
        assert self.Q is not None and self.S_B is not None
        return self.Q, self.S_B

    def down(self) -> Tensor:
        """Compute the down projections D_t, [N, r, n]."""
        if self.A is not None:
            return self.A
        P, S = self.subspace()
        return P @ S

    def up(self) -> Tensor:
        """Compute the transposed up projections U_t, [N, r, m]."""
        if self.B is not None:
            return self.B
        Q, S_B = self.up_subspace()
        return Q @ S_B

    def delta_weight(self, scaling: float) -> Tensor:
        """Compute `scaling · Σ_t U_t D_t`, [m, n].

        Without a router this is the change of W. With a router the change depends on the token.
        """
        return scaling * (self.up().flatten(0, 1).T @ self.down().flatten(0, 1))


class StackedWeights(NamedTuple):
    """The weights of K adapters of one shape, in G layers that read the same input.

    Attributes:
        layers: Names of the layers.
        router: Router weights of all layers, [K, G·N, n]; None if there is one expert.
        down: A or S of all layers, one below the other, [K, G·R, n].
        factors: The other matrices of each layer, each with K as its first dimension. A and S are None.
    """

    layers: tuple[str, ...]
    router: Tensor | None
    down: Tensor
    factors: list[Factors]

    def select(self, members: slice) -> StackedWeights:
        """Return the weights of some adapters."""
        if members == slice(0, len(self.down)):
            return self
        factors = [Factors(*(None if t is None else t[members] for t in of_layer)) for of_layer in self.factors]
        router = None if self.router is None else self.router[members]
        return StackedWeights(self.layers, router, self.down[members], factors)
