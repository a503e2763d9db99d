"""Base product and experts of sibling layers in as few passes over the data as there can be.

Layers that read the same input (Q, K and V; Gate and Up) are computed together: the down sides and routers of all are
one product, what comes out is routed and gated in one kernel, each up side is added to its base product in place or is
part of it (`beside.py`), and in the backward pass the gradients of the input are added up by the products that make
them. Weights are read from narrow copies, stacked as the products want them; sums and weight gradients are float32. A
sibling's dropout is its siblings': one mask for the input they share, kept as bits.

Shapes: T tokens, n in, m out, G siblings, N experts, r rank, H = N·r, R rows of a sibling's down side.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.fused import augmented_weights
from malora.fused.kernels import (
    down_backward,
    down_forward,
    down_tiling,
    dropout,
    gate,
    quantize_fp8,
    transpose_copy,
    up_backward,
)
from malora.fused.packed_weights import Narrow, Stack
from malora.fused.streams import run_on_parallel_streams, saturates_device
from malora.fused.tensor_utils import dtype_of_products, flat
from malora.routing import Routing


def outputs(stack: Stack, x: Tensor) -> list[Tensor]:
    """Every layer's output for x [..., n]; leaves what was routed in the layers."""
    config, xh, seed = stack.config, None, None
    parameters = [p for layer in stack.layers for p in stack.parameters(layer)]
    if config.lora_dropout and stack.layers[0].training:
        seed = torch.randint(2**31 - 1, (1,), device=x.device)
        if x.dtype == dtype_of_products(x):
            xh = augmented_weights.taken_room(x, len(stack.layers) * stack.H8)
    x_Tn = flat(x) if xh is None else x.flatten(0, -2)
    ys = _Experts.apply(x_Tn, xh, seed, stack, stack.narrow(parameters, x_Tn), *parameters)
    if config.has_router:
        ys, probabilities = ys[: len(stack.layers)], ys[len(stack.layers) :]
        for layer, probability in zip(stack.layers, probabilities, strict=True):
            if layer.routing_log.listening:
                layer.routings[stack.adapter] = Routing(probability.unflatten(0, x.shape[:-1]), config.top_k)
    return [y.unflatten(0, x.shape[:-1]) for y in ys]


class _Experts(torch.autograd.Function):
    """(x [T, n], x with room for h [T, n + G·H] or None, dropout's seed [1] or None, the stack, its narrow weights, its
    parameters) -> outputs [T, m] of each layer, and then, of routed ones, the probabilities [T, N] of each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, xh: Tensor | None, seed: Tensor | None, stack: Stack, narrow: Narrow, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        config, alpha, n = stack.config, stack.alpha, x.shape[1]
        bases = [layer.base_layer for layer in stack.layers]
        frozen = stack.frozen(ctx.needs_input_grad[0])
        there = stack.beside(narrow, frozen)
        weights = [] if frozen else [base.weight.to(x.dtype) for base in bases]
        biases = [base.bias for base in bases]
        bits = None if seed is None else dropout.draw_mask(*x.shape, seed, config.lora_dropout)
        if frozen:
            units, puts = (there.units, []) if there else frozen.beside(narrow.B, alpha)
            routed = partial(_routed, stack, x, bits, narrow)
            (zl, h, probabilities), *_ = run_on_parallel_streams(x, [routed, *puts])
            ys = frozen.outputs(x, biases, quantize_fp8.UpOperand(h, units))
        elif wholes := stack.wholes(x) if bits is not None else None:
            made = down_tiling.aligned_rows(x, n + len(wholes) * stack.H8) if xh is None else xh
            routed = partial(_routed, stack, x, bits, narrow, made, copies=xh is None)
            fills = [] if there else [partial(transpose_copy.write_up_proj, wholes, narrow.B, alpha)]
            (zl, h, probabilities), *_ = run_on_parallel_streams(x, [routed, *fills])
            ys = augmented_weights.outputs(made, wholes, biases)
            if xh is None:
                x = made[:, :n]
        else:
            zl, h, probabilities = _routed(stack, x, bits, narrow)
            of_each = zip(weights, biases, h, narrow.B, strict=True)
            ys = run_on_parallel_streams(
                x, [partial(_output, x, W, bias, h_g, B, alpha) for W, bias, h_g, B in of_each]
            )
        ctx.stack, ctx.frozen, ctx.beside = stack, frozen, there
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, bits, zl, h if config.has_router else None, *narrow[:2], *narrow.B, *weights)
        return (*ys, *probabilities)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        stack, alpha = ctx.stack, ctx.stack.alpha
        config, s, G = stack.config, stack.shape, len(stack.layers)
        x, bits, zl, h, down, P, *rest = ctx.saved_tensors
        Bs, weights = rest[:G], rest[G:]
        dys = [
            x.new_zeros(len(x), B.shape[1]) if dy is None else dy.contiguous()
            for dy, B in zip(gradients[:G], Bs, strict=True)
        ]
        wanted = ctx.needs_input_grad[5:]
        needs = {kind: any(wanted[i :: len(stack.kinds)]) for i, kind in enumerate(stack.kinds)}  # of any sibling

        frozen = ctx.frozen if ctx.needs_input_grad[0] else None
        dzl = down_tiling.aligned_rows(x, len(down))
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
            is_there = ctx.beside is not None and stack.group.beside is ctx.beside
            if not is_there:
                stack.group.beside = None
            base, of_each = frozen.gradients(dys, Bs, alpha, puts=not is_there)
            dh = of_each if config.has_router else dh.copy_(of_each)
        elif (
            saturates_device(x)
            and needs["B"]
            and all(up_backward.is_profitable(dy, h_g, stack.H8) for dy, h_g in zip(dys, h, strict=True))
        ):
            dBs = up_backward.up_proj_backward(dys, h, Bs, alpha, dh)
        else:  # what follows waits for h's alone
            run_on_parallel_streams(x, [partial(of_h, g) for g in range(G)])
        if config.has_router:
            e = gate.gate_backward(zl, P, dh, _stacked(gradients[G:], x, s.N), dzl, s)

        def of_x() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            of = {
                "needs_dx": ctx.needs_input_grad[0],
                "needs_dweights": any(needs.get(kind) for kind in ("A", "S", "router")),
                "subspace": stack.of_p(e, zl) if needs.get("P") else None,
                "counters": stack.counts(x),
            }
            found = down_backward.down_proj_backward(dzl, x, bits, down, s.logits_at, config.lora_dropout, base, **of)
            if of["needs_dx"]:
                for dy, W in zip(dys, weights, strict=False):  # none with 8 bits
                    found[0].addmm_(dy, W)
            return found

        def of_ups() -> list[Tensor]:
            if dBs or not needs["B"]:
                return dBs
            made = [down_tiling.matmul_tn_fp32(h[g], dys[g]) for g in range(G)]
            if alpha != 1:
                torch._foreach_mul_(made, alpha)
            return made

        (dx, ddown, dP), dBs = run_on_parallel_streams(x, [of_x, of_ups])
        # What is not trained gets its weights for gradients, which are then left out.
        ddown, dBs, dP = down if ddown is None else ddown, dBs or Bs, P if dP is None else stack.of_each(dP)
        found = [part for g in range(G) for part in stack.parts(ddown, dP, dBs[g], g)]
        return (
            dx,
            None,
            None,
            None,
            None,
            *(part if needed else None for part, needed in zip(found, wanted, strict=True)),
        )


def _routed(
    stack: Stack, x: Tensor, bits: Tensor | None, narrow: Narrow, xh: Tensor | None = None, copies: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """zl [T, G·(R + N)], h [G, T, H] and the probabilities [T, N] of each sibling.

    Writes h, and x where it `copies` that, into `xh` [T, n + G·H], if there is one. Without a router h is z, a view of
    zl.
    """
    config, s, down, G = stack.config, stack.shape, narrow.down, len(stack.layers)
    x_there, h_there = (None, None) if xh is None else xh.tensor_split([x.shape[1]], 1)
    x_there = x_there if copies else None
    parts = None
    if bits is None:
        zl = torch.mm(x, down.T, out=down_tiling.aligned_rows(x, len(down)))
    elif config.has_router:
        zl, parts = down_forward.dropout_matmul_split_k(x, bits, down, s.logits_at, config.lora_dropout, x_there)
    else:
        zl = down_forward.dropout_matmul(x, bits, down, s.logits_at, config.lora_dropout, x_there, h_there)
    if not config.has_router:
        return zl, stack.by_sibling(zl), ()
    h = x.new_empty(G, len(x), stack.H8) if xh is None else h_there.unflatten(1, (G, stack.H8)).transpose(0, 1)
    if stack.has_gaps:
        h.zero_()
    return zl, h, gate.gate(zl, narrow.P, h, s, parts).unbind()


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
