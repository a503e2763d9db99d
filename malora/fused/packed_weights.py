"""Pack an adapter's weights for the GEMMs of a projection group.

The results are the matrices that these GEMMs read.

The G projections of a group (Q, K, V; or Gate, Up) read the same input. One GEMM computes all their down projections
and router logits, so those weights are stacked; the others keep a matrix per projection:

    down [G·R8 + G·N8, n]   the down projections of all projections, then all routers
    P    [G, N, r, D8]      coefficients over the subspace, if the method has one
    B    G times [H8, m]    the up projections

Sizes are rounded up to multiples of 8, because tensor cores read no less. The padding is zero. All matrices of
a model lie in one flat buffer and are filled by one launch.

| symbol | meaning | size |
| --- | --- | --- |
| G | projections of the group | 1 to 3 |
| n, m | input and output features | |
| N, r | experts, and the rank of one | |
| H | total rank of a projection's experts | N·r |
| R | rows of a projection's down projection | d with a subspace, else H |
| D | columns of P | d, or d/N if each expert has a subspace |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from malora.fused.kernels.down_backward import SubspaceGrad
from malora.fused.kernels.gate import GateLayout
from malora.fused.kernels.multi_copy import Tables, multi_tensor_copy
from malora.fused.tensor_utils import round_up

if TYPE_CHECKING:
    from malora.fused.protocol import FusedLayer

# The parameters of a projection, in the order in which they are passed around.
KINDS = ("router", "A", "P", "S", "B")
# Elements. Each matrix of a flat buffer begins at a multiple of it, so that it is read in wide loads.
BUFFER_ALIGNMENT = 64


class PackedWeights(NamedTuple):
    """The packed weights of one adapter on a projection group, padded with zeros.

    They have the dtype of the matmuls.
    """

    down: Tensor  # [G·(R8 + N8), n]
    P: Tensor | None  # [G, N, r, D8]
    B: list[Tensor]  # G times [H8, m]
    flat: Tensor  # [elements], the memory of all of them


def layout_sizes(layers: Sequence[FusedLayer], adapter: str) -> list[int]:
    """Return the sizes that decide the layout of an adapter on layers that share their input.

    They are n, N, top_k, r, R, D, 1 if all experts share one subspace, 1 if gates are renormalised, 1 for each kind of
    KINDS that exists, and the output features of each layer. Plain numbers, because an operation of torch takes no
    other objects.
    """
    config, f = layers[0].settings[adapter], layers[0].factors(adapter)
    N, r, P, S = config.num_experts, config.r, f.P, f.S
    D = r if P is None else P.shape[2]
    R = N * r if S is None else S.numel() // S.shape[-1]
    is_shared = S is not None and S.dim() == 2
    exists = [config.has_router, f.A is not None, P is not None, S is not None, f.B is not None]
    flags = [int(flag) for flag in (is_shared, config.renormalize, *exists)]
    return [layers[0].in_features, N, config.top_k, r, R, D, *flags] + [layer.out_features for layer in layers]


@dataclass(frozen=True)
class PackedLayout:
    """Sizes of the packed weights, and where each parameter lies in them.

    It has no state.

    Attributes:
        G, n, out_features: projections, input features, output features of each projection.
        kinds: the parameters of a projection, in the order in which they are passed around.
        gate: sizes and offsets that the gate kernels take.
        H8, D8: the padded total rank of a projection's experts, and the padded columns of P.
        has_gaps: whether the router logits have padded columns, which a kernel reads and nobody writes.
        is_padded: whether any size was rounded up.
    """

    G: int
    n: int
    out_features: tuple[int, ...]
    kinds: tuple[str, ...]
    gate: GateLayout
    H8: int
    D8: int
    has_router: bool
    has_gaps: bool
    is_padded: bool

    @classmethod
    def of(cls, layers: Sequence[FusedLayer], adapter: str) -> PackedLayout:
        """Lay out an adapter on layers that share their input."""
        return cls.from_sizes(tuple(layout_sizes(layers, adapter)), layers[0].settings[adapter].scaling)

    @classmethod
    @cache
    def from_sizes(cls, sizes: tuple[int, ...], scaling: float) -> PackedLayout:
        """Lay out weights of the sizes that `layout_sizes` returns."""
        n, N, top_k, r, R, D, is_shared, renormalize, *exists = sizes[: 8 + len(KINDS)]
        out_features = sizes[8 + len(KINDS) :]
        kinds = tuple(kind for kind, found in zip(KINDS, exists, strict=True) if found)
        G, has_router = len(out_features), "router" in kinds
        true_sizes = (R, N * has_router, N * r, D)
        R8, N8, H8, D8 = padded = tuple(round_up(size, 8) for size in true_sizes)
        gate = GateLayout(
            N=N, top_k=top_k, r=r, D=D, z_step=0 if is_shared else D, z_group=R8, l_group=N8, logits_at=G * R8,
            has_p="P" in kinds, scaling=scaling, renormalize=bool(renormalize),
        )  # fmt: skip
        return cls(
            G=G, n=n, out_features=out_features, kinds=kinds, gate=gate, H8=H8, D8=D8, has_router=has_router,
            has_gaps=true_sizes[1] != N8, is_padded=true_sizes != padded,
        )  # fmt: skip

    @property
    def alpha(self) -> float:
        """The factor of the up projection: 1 with a router, else the scaling.

        A router scales each token's experts already, LoRA's scaling does not.
        """
        return 1.0 if self.has_router else self.gate.scaling

    @property
    def size(self) -> int:
        """Elements of a flat buffer that the packed weights take."""
        return sum(map(_aligned_size, self._shapes))

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the matrices in the order of `PackedWeights`.

        P is left out where there is none.
        """
        s = self.gate
        shapes: list[tuple[int, ...]] = [(self.G * (s.z_group + s.l_group), self.n)]
        shapes += [(self.G, s.N, s.r, self.D8)] * s.has_p
        return shapes + [(self.H8, m) for m in self.out_features]

    def unpack(self, flat: Tensor) -> PackedWeights:
        """Return a flat buffer [size] as packed weights."""
        pieces = zip(flat.split([*map(_aligned_size, self._shapes)]), self._shapes, strict=True)
        down, *rest = (piece[: math.prod(shape)].view(shape) for piece, shape in pieces)
        P, Bs = (rest[0], rest[1:]) if self.gate.has_p else (None, rest)
        return PackedWeights(down, P, Bs, flat)

    def views(self, down: Tensor, P: Tensor | None, B: Tensor, g: int) -> list[Tensor]:
        """Return projection g's parameters, in the order of `kinds`, as views.

        They are views of packed weights or of their gradients.
        """
        s = self.gate
        found = [down[s.logits_at + g * s.l_group :][: s.N]] if self.has_router else []
        rows = down[g * s.z_group :]
        if P is None:
            found.append(rows[: s.N * s.r].unflatten(0, (s.N, s.r)))
        else:
            found.append(P[g, ..., : s.D])
            found.append(rows[: s.N * s.D].unflatten(0, (s.N, s.D)) if s.z_step else rows[: s.D])
        return [*found, B[: s.N * s.r].unflatten(0, (s.N, s.r))]

    def by_projection(self, down_out: Tensor) -> Tensor:
        """Return the down projections' outputs in down_out [T, ...] as a view [G, T, R8]."""
        s = self.gate
        return torch.unflatten(down_out[:, : self.G * s.z_group], 1, (self.G, s.z_group)).transpose(0, 1)

    def subspace_grad(self, gated_dh: Tensor, down_out: Tensor) -> SubspaceGrad:
        """Return the two operands of the gradient of P."""
        s = self.gate
        return SubspaceGrad(gated_dh, self.by_projection(down_out), s.N * s.r, s.N * s.D if s.z_step else s.D)

    def dP_by_expert(self, dP: Tensor) -> Tensor:
        """Return dP as [G, N, r, D].

        It is given as [G, H, D], or as [G, H, N·D] where each expert has a subspace. In the second form only the blocks
        of an expert's rows with its own subspace count.
        """
        s = self.gate
        blocks = torch.unflatten(dP, 1, (s.N, s.r))
        return torch.einsum("gnrnd->gnrd", torch.unflatten(blocks, 3, (s.N, s.D))) if s.z_step else blocks


def _aligned_size(shape: tuple[int, ...]) -> int:
    return round_up(math.prod(shape), BUFFER_ALIGNMENT)


class PackedBuffer:
    """One flat buffer that holds the packed weights of several layouts.

    It has one dtype and lies on one device.
    """

    def __init__(self, layouts: list[PackedLayout], dtype: torch.dtype, device: torch.device) -> None:
        sizes = [layout.size for layout in layouts]
        allocate = torch.zeros if any(layout.is_padded for layout in layouts) else torch.empty
        self.flat = allocate(sum(sizes), dtype=dtype, device=device)
        pieces = zip(layouts, self.flat.split(sizes), strict=True)
        self.weights: list[PackedWeights] = []
        self._views: list[Tensor] = []
        for layout, piece in pieces:
            packed = layout.unpack(piece)
            self.weights.append(packed)
            for g, B in enumerate(packed.B):
                self._views += layout.views(packed.down, packed.P, B, g)

    @torch.no_grad()
    def fill(self, parameters: list[Tensor], tables: Tables) -> None:
        """Copy the parameters of all layouts, in their order, into the buffer.

        `tables` must live as long as the parameters: CUDA graphs read them (see `multi_tensor_copy`).
        """
        multi_tensor_copy([p.detach() for p in parameters], self._views, self.flat, tables)
