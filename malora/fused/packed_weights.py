"""The weights of layers that are computed together, in the forms that the fused backends' products read.

Weights are read from narrow copies, stacked as the products want them, and made for a whole model at once.

Shapes: n in, m out, G siblings, N experts, r rank, H = N·r, R rows of a sibling's down side.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from malora.fused import augmented_weights, fp8_weights
from malora.fused.kernels import down_backward, transpose_copy
from malora.fused.kernels.gate import GateLayout
from malora.fused.kernels.multi_copy import multi_tensor_copy
from malora.fused.tensor_utils import is_captured

if TYPE_CHECKING:
    from malora.layer import MaloraLayer

ALIGNED = 64  # elements: every weight of a flat copy begins at a multiple of it, so that it is read in wide loads
Form = tuple[torch.dtype, torch.device]  # of the products


class Narrow(NamedTuple):
    """The weights of a stack in the dtype of the products, padded with zeros."""

    down: Tensor  # [G·(R + N), n]: all down sides, then all routers
    P: Tensor | None  # [G, N, r, D]
    B: list[Tensor]  # of each sibling, [H, m]


class Beside(NamedTuple):
    """Whose B lies beside the frozen weights of siblings, for as long as weights are held."""

    narrow: Narrow
    frozen: fp8_weights.Float8Weights | None  # the weights, where they are in 8 bits
    units: Tensor | None  # what h is then multiplied by


class Stack:
    """One adapter of some siblings: their weights in the forms that the products read."""

    def __init__(self, layers: list[MaloraLayer], adapter: str) -> None:
        self.layers, self.adapter = layers, adapter
        self.config = config = layers[0].settings[adapter]
        f = layers[0].factors(adapter)
        G, N, r = len(layers), config.num_experts, config.r
        R = N * r if f.P is None else config.d
        D = r if f.P is None else f.P.shape[2]
        routers = N if config.has_router else 0
        # Rows and columns of matrix products come in eights, or the tensor cores stand idle; what pads them is zero.
        R8, N8, self.H8, self.D8 = (-(-size // 8) * 8 for size in (R, routers, N * r, D))
        self.is_padded = (R, routers, N * r, D) != (R8, N8, self.H8, self.D8)
        shared = f.S is not None and f.S.dim() == 2
        # The gate's kernels write what pads the gradient of a z that experts share; other gaps come with those in the
        # logits. Without a router there is no gate, and a product writes all of z.
        self.has_gaps = routers != N8
        self.shape = GateLayout(
            N=N, top_k=config.top_k, r=r, D=D, z_step=0 if shared else D, z_group=R8, l_group=N8, logits_at=G * R8,
            has_p=f.P is not None, scaling=config.scaling,
        )  # fmt: skip
        present = {"router": config.has_router} | {kind: getattr(f, kind) is not None for kind in "APSB"}
        self.kinds = [kind for kind, there in present.items() if there]
        self._kept: tuple[tuple, Narrow] | None = None
        self._form: Form | None = None  # of the last pass with gradients
        self._ahead: Narrow | None = None  # copied by `copy_ahead`, for one pass
        self.held: Narrow | None = None  # for the passes inside `HeldWeights`
        self.group = layers[0].group
        # A router scales each token's experts; without one the product of the up side does it.
        self.alpha = 1.0 if config.has_router else config.scaling

    def parameters(self, layer: MaloraLayer) -> list[Tensor]:
        """In the order of `kinds`."""
        factors = layer.factors(self.adapter)
        return [layer.malora_router[self.adapter] if k == "router" else getattr(factors, k) for k in self.kinds]

    def narrow(self, parameters: list[Tensor], x: Tensor) -> Narrow:
        """Copies of the weights: made by every pass with gradients that finds none held, kept by passes without
        gradients until the mode changes.

        Nothing tells for certain that a weight has changed: a fused optimizer's step does not raise its version.
        """
        form = (x.dtype, x.device)
        if torch.is_grad_enabled():
            self.group.drop_kept()  # who makes gradients will change weights
            self._form, ahead, self._ahead = form, self._ahead, None
            made = (
                narrow for narrow in (self.held, ahead) if narrow and (narrow.down.dtype, narrow.down.device) == form
            )
            return next(made, None) or self._copied(form)
        key = (*form, is_captured(x), *((p.data_ptr(), p._version) for p in parameters))
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._copied(form)
        return self._kept[1]

    def _copied(self, form: Form) -> Narrow:
        (copies,) = room_for_copies([(self, form)])
        copies.make()
        return copies.narrow[0]

    def drop_kept(self) -> None:
        """Weights may have changed since a pass without gradients copied them."""
        self._kept = None

    def wholes(self, x: Tensor) -> list[Tensor] | None:
        """Weights with room for B, for base and up side as one product; None where that does not pay or cannot be."""
        if self.config.backend == "fp8" or not augmented_weights.is_profitable(self.layers):
            return None
        return augmented_weights.weights(self.layers, self.H8, x.dtype)

    @property
    def form(self) -> Form | None:
        """Of the next pass with gradients, if it is like the last; None before one, or if weights have moved since."""
        return self._form if self._form and self._form[1] == self.layers[0].base_layer.weight.device else None

    def frozen(self, backward: bool) -> fp8_weights.Float8Weights | None:
        """The base weights in 8 bits, of the backend that has them."""
        if self.config.backend != "fp8":
            return None
        bases = [layer.base_layer for layer in self.layers]
        return fp8_weights.frozen(bases, self.group.frozen, backward, self.H8)

    def lay_beside(self, narrow: Narrow, units: Tensor | None) -> Tensor | None:
        """Puts B beside the frozen weights, for all passes that read these copies, if an earlier one made room.

        Returns what h is then multiplied by, in `units` if they are given, for graphs read those of before.
        """
        frozen = self.frozen(backward=True)
        if frozen:
            units, works = frozen.beside(narrow.B, self.alpha, units)
            works += frozen.below(narrow.B, self.alpha)
        elif self.group.rooms and (wholes := self.wholes(narrow.down)):
            works = [partial(transpose_copy.write_up_proj, wholes, narrow.B, self.alpha)]
        else:
            return None
        for work in works:
            work()
        self.group.beside = Beside(narrow, frozen, units)
        return units

    def beside(self, narrow: Narrow, frozen: fp8_weights.Float8Weights | None) -> Beside | None:
        """What lies beside these weights if it is of these copies. If not, a pass puts its own there, for itself."""
        found = self.group.beside
        if found is None or found.narrow is not narrow or found.frozen is not frozen:
            found = self.group.beside = None
        return found

    def counts(self, x: Tensor) -> Tensor:
        """Those of `masked.gradients`, zeros between its calls: nobody has to clear them in a backward pass.

        They are the siblings', and outlive a stack, for graphs count in them.
        """
        found = self.group.counts
        if found is None or found.device != x.device:
            found = down_backward.split_k_counters(x)
            if not is_captured(x):
                self.group.counts = found
        return found

    def drop_ahead(self) -> None:
        """A layer that did not run leaves its copies; weights may have changed when it does."""
        self._ahead = None

    @property
    def room(self) -> int:
        """Elements that copies of its weights take."""
        return sum(map(_aligned, self._shapes))

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        """Of what is in `Narrow`, in its order; without P where there is none."""
        s, G = self.shape, len(self.layers)
        shapes = [(G * (s.z_group + s.l_group), self.layers[0].in_features)]
        shapes += [(G, s.N, s.r, self.D8)] * s.has_p
        return shapes + [(self.H8, layer.out_features) for layer in self.layers]

    def lay_out(self, flat: Tensor) -> tuple[Narrow, list[Tensor]]:
        """Room [room] as the weights of a pass, and the views of it that are each parameter's."""
        parts = zip(flat.split([*map(_aligned, self._shapes)]), self._shapes, strict=True)
        down, *rest = (part[: math.prod(shape)].view(shape) for part, shape in parts)
        P, Bs = (rest[0], rest[1:]) if self.shape.has_p else (None, rest)
        return Narrow(down, P, Bs), [view for g, B in enumerate(Bs) for view in self.parts(down, P, B, g)]

    def by_sibling(self, zl: Tensor) -> Tensor:
        """z of each sibling, [G, T, R], as a view."""
        G = len(self.layers)
        return zl[:, : G * self.shape.z_group].unflatten(1, (G, self.shape.z_group)).transpose(0, 1)

    def of_p(self, e: Tensor, zl: Tensor) -> down_backward.SubspaceGrad:
        """What the gradients of P are made of: e of all experts, and all of z."""
        s = self.shape
        return down_backward.SubspaceGrad(e, self.by_sibling(zl), s.N * s.r, s.N * s.D if s.z_step else s.D)

    def of_each(self, dP: Tensor) -> Tensor:
        """[G, N, r, D] of dP [G, H, D], or of [G, H, N·D], where an expert's rows beside another's z do not count."""
        s = self.shape
        dP = dP.unflatten(1, (s.N, s.r))
        return torch.einsum("gnrnd->gnrd", dP.unflatten(3, (s.N, s.D))) if s.z_step else dP

    def parts(self, down: Tensor, P: Tensor | None, B: Tensor, g: int) -> list[Tensor]:
        """Sibling g's parameters as views of stacked tensors, which hold weights or their gradients."""
        s = self.shape
        found = [down[s.logits_at + g * s.l_group :][: s.N]] if self.config.has_router else []
        rows = down[g * s.z_group :]
        if P is None:
            found.append(rows[: s.N * s.r].unflatten(0, (s.N, s.r)))
        else:
            found.append(P[g, ..., : s.D])
            found.append(rows[: s.N * s.D].unflatten(0, (s.N, s.D)) if s.z_step else rows[: s.D])
        return [*found, B[: s.N * s.r].unflatten(0, (s.N, s.r))]


def _aligned(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // ALIGNED) * ALIGNED


class Copies(NamedTuple):
    """Room for narrow copies of stacks, in one dtype on one device."""

    stacks: list[Stack]
    narrow: list[Narrow]  # of each stack
    views: list[Tensor]  # of each parameter
    flat: Tensor  # all that they lie in

    @property
    def pairs(self) -> list[tuple[Stack, Narrow]]:
        return [*zip(self.stacks, self.narrow, strict=True)]

    @torch.no_grad()
    def make(self) -> None:
        weights = [p.detach() for stack in self.stacks for layer in stack.layers for p in stack.parameters(layer)]
        multi_tensor_copy(weights, self.views, self.flat, self.stacks[0].group.tables)


def room_for_copies(of: list[tuple[Stack, Form]]) -> list[Copies]:
    """All that are of one form together."""
    by_form: dict[Form, list[Stack]] = {}
    for stack, form in of:
        by_form.setdefault(form, []).append(stack)
    found = []
    for (dtype, device), alike in by_form.items():
        rooms = [stack.room for stack in alike]
        make = torch.zeros if any(stack.is_padded for stack in alike) else torch.empty
        flat = make(sum(rooms), dtype=dtype, device=device)
        laid_out = [stack.lay_out(part) for stack, part in zip(alike, flat.split(rooms), strict=True)]
        views = [view for _, mine in laid_out for view in mine]
        found.append(Copies(alike, [narrow for narrow, _ in laid_out], views, flat))
    return found


def copy_ahead(stacks: list[Stack]) -> None:
    """Copies the weights of stacks that have trained before, for the next pass of each."""
    for copies in room_for_copies([(stack, stack.form) for stack in stacks if stack.form]):
        copies.make()
        for stack, narrow in copies.pairs:
            stack._ahead = narrow
