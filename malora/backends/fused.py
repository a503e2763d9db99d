"""Base product and experts of sibling layers in as few passes over the data as there can be.

Layers that read the same input (Q, K and V; Gate and Up) are computed together: the down sides and routers of all are
one product, what comes out is routed and gated in one kernel, each up side is added to its base product in place or is
part of it (`beside.py`), and in the backward pass the gradients of the input are added up by the products that make
them. Weights are read from narrow copies, stacked as the products want them; sums and weight gradients are float32. A
sibling's dropout is its siblings': one mask for the input they share, kept as bits.

Shapes: T tokens, n in, m out, G siblings, N experts, r rank, H = N·r, R rows of a sibling's down side.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.backends import beside, dropout, flat, fp8, kernels, masked, up
from malora.backends.copies import copy_all
from malora.backends.kernels import GateShape
from malora.backends.lanes import fills_device, side_by_side
from malora.routing import Routing

if TYPE_CHECKING:
    from malora.layer import MaloraLayer


ALIGNED = 64  # elements: every weight of a flat copy begins at a multiple of it, so that it is read in wide loads


class Narrow(NamedTuple):
    """The weights of a stack in the dtype of the products, padded with zeros."""

    down: Tensor  # [G·(R + N), n]: all down sides, then all routers
    P: Tensor | None  # [G, N, r, D]
    B: list[Tensor]  # of each sibling, [H, m]


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
        self.shape = GateShape(
            N=N, top_k=config.top_k, r=r, D=D, z_step=0 if shared else D, z_group=R8, l_group=N8, logits_at=G * R8,
            has_p=f.P is not None, scaling=config.scaling,
        )  # fmt: skip
        present = {"router": config.has_router} | {kind: getattr(f, kind) is not None for kind in "APSB"}
        self.kinds = [kind for kind, there in present.items() if there]
        self._kept: tuple[tuple, Narrow] | None = None
        self._form: tuple[torch.dtype, torch.device] | None = None  # of the last pass
        self._ahead: Narrow | None = None  # copied by `copy_ahead`, for one pass
        self._counts: Tensor | None = None

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Every layer's output for x [..., n]; leaves what was routed in the layers."""
        config, x_Tn = self.config, flat(x)
        parameters = [p for layer in self.layers for p in self._parameters(layer)]
        seed = None
        if config.lora_dropout and self.layers[0].training:
            seed = torch.randint(2**31 - 1, (1,), device=x.device)
        ys = _Experts.apply(x_Tn, seed, self, self._narrow(parameters, x_Tn), *parameters)
        if config.has_router:
            ys, probabilities = ys[: len(self.layers)], ys[len(self.layers) :]
            for layer, probability in zip(self.layers, probabilities, strict=True):
                if layer.routing_log.listening:
                    layer.routings[self.adapter] = Routing(probability.unflatten(0, x.shape[:-1]), config.top_k)
        return [y.unflatten(0, x.shape[:-1]) for y in ys]

    def _parameters(self, layer: MaloraLayer) -> list[Tensor]:
        """In the order of `kinds`."""
        factors = layer.factors(self.adapter)
        return [layer.malora_router[self.adapter] if k == "router" else getattr(factors, k) for k in self.kinds]

    def _narrow(self, parameters: list[Tensor], x: Tensor) -> Narrow:
        """Copies of the weights: made by every pass with gradients, kept by those without until the mode changes.

        Nothing tells for certain that a weight has changed: a fused optimizer's step does not raise its version.
        """
        if torch.is_grad_enabled():
            self._kept, form = None, (x.dtype, x.device)
            if self._ahead is None or self._form != form:
                self._form = form
                copy_ahead([self])
            ahead, self._ahead = self._ahead, None
            return ahead
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        key = (x.dtype, x.device, capturing, *((p.data_ptr(), p._version) for p in parameters))
        if self._kept is None or self._kept[0] != key:
            self._form = (x.dtype, x.device)
            copy_ahead([self])
            self._kept, self._ahead = (key, self._ahead), None
        return self._kept[1]

    def wholes(self, x: Tensor) -> list[Tensor] | None:
        """Weights with room for B, for base and up side as one product; None where that does not pay or cannot be."""
        if self.config.backend == "fp8" or not beside.pays(self.layers):
            return None
        return beside.weights(self.layers, self.H8, x.dtype)

    def counts(self, x: Tensor) -> Tensor:
        """Those of `masked.gradients`, zeros between its calls: nobody has to clear them in a backward pass."""
        if self._counts is None or self._counts.device != x.device:
            self._counts = masked.counts_for(x)
        return self._counts

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

    def of_p(self, e: Tensor, zl: Tensor) -> masked.OfP:
        """What the gradients of P are made of: e of all experts, and all of z."""
        s = self.shape
        return masked.OfP(e, self.by_sibling(zl), s.N * s.r, s.N * s.D if s.z_step else s.D)

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


@torch.no_grad()
def copy_ahead(stacks: list[Stack]) -> None:
    """Copies the weights of stacks that have run before, for the next pass of each; all that are of a kind at once."""
    by_form: dict[tuple, list[Stack]] = {}
    for stack in stacks:
        if stack._form is not None:
            by_form.setdefault(stack._form, []).append(stack)
    for (dtype, device), alike in by_form.items():
        rooms = [stack.room for stack in alike]
        make = torch.zeros if any(stack.is_padded for stack in alike) else torch.empty
        flat = make(sum(rooms), dtype=dtype, device=device)
        weights, views = [], []
        for stack, part in zip(alike, flat.split(rooms), strict=True):
            stack._ahead, mine = stack.lay_out(part)
            views += mine
            weights += [p.detach() for layer in stack.layers for p in stack._parameters(layer)]
        copy_all(weights, views, flat, alike[0].layers[0].siblings.tables)


class _Experts(torch.autograd.Function):
    """(x [T, n], dropout's seed [1] or None, the stack, its narrow weights, its parameters) -> outputs [T, m] of each
    layer, and then, of routed ones, the probabilities [T, N] of each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seed: Tensor | None, stack: Stack, narrow: Narrow, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        config, n = stack.config, x.shape[1]
        alpha = 1.0 if config.has_router else config.scaling
        bases = [layer.base_layer for layer in stack.layers]
        frozen = None
        if config.backend == "fp8":
            frozen = fp8.frozen(bases, stack.layers[0].siblings.frozen, ctx.needs_input_grad[0], stack.H8)
        weights = [] if frozen else [base.weight.to(x.dtype) for base in bases]
        biases = [base.bias for base in bases]
        bits = None if seed is None else dropout.mask(*x.shape, seed, config.lora_dropout)
        if frozen:
            units, puts = frozen.beside(narrow.B, alpha)
            routed = partial(_routed, stack, x, bits, narrow)
            (zl, h, probabilities), *_ = side_by_side(x, [routed, *puts])
            ys = frozen.outputs(x, biases, fp8.Up(h, units))
        elif wholes := stack.wholes(x) if bits is not None else None:
            xh = masked.rows_of(x, n + len(wholes) * stack.H8)
            routed = partial(_routed, stack, x, bits, narrow, xh)
            fill = partial(beside.fill, wholes, narrow.B, alpha)
            (zl, h, probabilities), _ = side_by_side(x, [routed, fill])
            ys = beside.outputs(xh, wholes, biases)
            x = xh[:, :n]
        else:
            zl, h, probabilities = _routed(stack, x, bits, narrow)
            of_each = zip(weights, biases, h, narrow.B, strict=True)
            ys = side_by_side(x, [partial(_output, x, W, bias, h_g, B, alpha) for W, bias, h_g, B in of_each])
        ctx.stack, ctx.alpha, ctx.frozen = stack, alpha, frozen
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, bits, zl, h if config.has_router else None, *narrow[:2], *narrow.B, *weights)
        return (*ys, *probabilities)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        stack, alpha = ctx.stack, ctx.alpha
        config, s, G = stack.config, stack.shape, len(stack.layers)
        x, bits, zl, h, down, P, *rest = ctx.saved_tensors
        Bs, weights = rest[:G], rest[G:]
        dys = [
            x.new_zeros(len(x), B.shape[1]) if dy is None else dy.contiguous()
            for dy, B in zip(gradients[:G], Bs, strict=True)
        ]
        wanted = ctx.needs_input_grad[4:]
        needs = {kind: any(wanted[i :: len(stack.kinds)]) for i, kind in enumerate(stack.kinds)}  # of any sibling

        frozen = ctx.frozen if ctx.needs_input_grad[0] else None
        dzl = masked.rows_of(x, len(down))
        if stack.has_gaps:
            dzl.zero_()
        if config.has_router:
            dh = None if frozen else x.new_empty(h.shape)
        else:
            h, dh = stack.by_sibling(zl), stack.by_sibling(dzl)

        def of_h(g: int) -> None:
            dh_g = dh[g]
            torch.addmm(dh_g, dys[g], Bs[g].T, beta=0, alpha=alpha, out=dh_g)

        dBs, base = [], None
        if frozen:
            base, of_each = frozen.gradients(dys, Bs, alpha)
            dh = of_each if config.has_router else dh.copy_(of_each)
        elif fills_device(x) and needs["B"] and all(up.pays(dy, h_g, stack.H8) for dy, h_g in zip(dys, h, strict=True)):
            dBs = up.gradients(dys, h, Bs, alpha, dh)
        else:  # what follows waits for h's alone
            side_by_side(x, [partial(of_h, g) for g in range(G)])
        if config.has_router:
            e = kernels.gate_backward(zl, P, dh, _stacked(gradients[G:], x, s.N), dzl, s)

        def of_x() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            of = {
                "of_input": ctx.needs_input_grad[0],
                "of_weights": any(needs.get(kind) for kind in ("A", "S", "router")),
                "of_p": stack.of_p(e, zl) if needs.get("P") else None,
                "counts": stack.counts(x),
            }
            found = masked.gradients(dzl, x, bits, down, s.logits_at, config.lora_dropout, base, **of)
            if of["of_input"]:
                for dy, W in zip(dys, weights, strict=False):  # none with 8 bits
                    found[0].addmm_(dy, W)
            return found

        def of_ups() -> list[Tensor]:
            if dBs or not needs["B"]:
                return dBs
            made = [masked.summed(h[g], dys[g]) for g in range(G)]
            if alpha != 1:
                torch._foreach_mul_(made, alpha)
            return made

        (dx, ddown, dP), dBs = side_by_side(x, [of_x, of_ups])
        # What is not trained gets its weights for gradients, which are then left out.
        ddown, dBs, dP = down if ddown is None else ddown, dBs or Bs, P if dP is None else stack.of_each(dP)
        found = [part for g in range(G) for part in stack.parts(ddown, dP, dBs[g], g)]
        return dx, None, None, None, *(part if needed else None for part, needed in zip(found, wanted, strict=True))


def _routed(
    stack: Stack, x: Tensor, bits: Tensor | None, narrow: Narrow, xh: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """zl [T, G·(R + N)], h [G, T, H] and the probabilities [T, N] of each sibling.

    Writes x and h into `xh` [T, n + G·H], if there is one. Without a router h is z, a view of zl.
    """
    config, s, down, G = stack.config, stack.shape, narrow.down, len(stack.layers)
    x_there, h_there = (None, None) if xh is None else xh.tensor_split([x.shape[1]], 1)
    parts = None
    if bits is None:
        zl = torch.mm(x, down.T, out=masked.rows_of(x, len(down)))
    elif config.has_router:
        zl, parts = masked.down_in_parts(x, bits, down, s.logits_at, config.lora_dropout, x_there)
    else:
        zl = masked.down(x, bits, down, s.logits_at, config.lora_dropout, x_there, h_there)
    if not config.has_router:
        return zl, stack.by_sibling(zl), ()
    h = x.new_empty(G, len(x), stack.H8) if xh is None else h_there.unflatten(1, (G, stack.H8)).transpose(0, 1)
    if stack.has_gaps:
        h.zero_()
    return zl, h, kernels.gate(zl, narrow.P, h, s, parts).unbind()


def _output(x: Tensor, W: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, alpha: float) -> Tensor:
    """x Wᵀ + bias + alpha · h B: [T, m]. The base product comes second: adding to what is there hides behind it."""
    start = x.new_empty(()) if bias is None else bias.to(x.dtype)
    y = torch.addmm(start, h, B, beta=0 if bias is None else 1, alpha=alpha)
    return y.addmm_(x, W.T)


def _stacked(gradients: tuple[Tensor | None, ...], x: Tensor, N: int) -> Tensor | None:
    """The gradients of the probabilities, [G, T, N]; None where no sibling has one."""
    if all(gradient is None for gradient in gradients):
        return None
    if any(gradient is None for gradient in gradients):
        zero = x.new_zeros(len(x), N, dtype=torch.promote_types(x.dtype, torch.float32))
        return torch.stack([zero if gradient is None else gradient for gradient in gradients])
    if _side_by_side(gradients):  # as a balance loss over all layers leaves them
        first = gradients[0]
        return first.as_strided((len(gradients), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(gradients)


def _side_by_side(tensors: tuple[Tensor, ...]) -> bool:
    """Whether tensors of one shape lie in memory as `torch.stack` would lay them."""
    first, storages = tensors[0], {tensor.untyped_storage().data_ptr() for tensor in tensors}
    places = [first.storage_offset() + place * first.numel() for place in range(len(tensors))]
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    return contiguous and len(storages) == 1 and [tensor.storage_offset() for tensor in tensors] == places
