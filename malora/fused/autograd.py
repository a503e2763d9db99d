"""Forward and backward of a projection group.

Frozen layers, routers and experts are computed together.

How one pass goes, for G projections that read the same input x:

1. The down projections and routers of all G are one GEMM over x, with dropout inside: `down_out`.
2. One kernel turns the logits into gates and applies them at rank width: `h`.
3. Each frozen layer and its up projection give x Wᵀ + h B (`bases.py`).

Backward, in reverse order: dh, then the gate's gradients `d_down_out`, then the gradients of x and of the down
projections by one kernel. The GEMMs that make the gradient of x add it up themselves.

The weights are read from packed copies in the dtype of the matmuls; sums and weight gradients are in float32 or wider.
All projections of a group share one dropout mask, because they share their input. It is kept as bits. The router reads
x without dropout.

| symbol | meaning | size |
| --- | --- | --- |
| T, n, m | tokens, input features, output features | |
| G, N, r | projections, experts, rank | H = N·r |
| x_and_h | x and the h of all projections next to each other | [T, n + G·H8] |
| down_out | outputs of the down projections, then router logits | [T, G·(R8 + N8)] |
| h | gated outputs at rank width | [G, T, H8] |
| gated_dh | gradient of h times the gates, of which dP is made | [G, T, H8] |
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.fused.bases import Base, WithoutOutputs, choose_base
from malora.fused.four_bit_weights import matmul_dtype_of
from malora.fused.kernels import down_forward, dropout, gate, up_backward
from malora.fused.kernels.down_backward import down_proj_backward
from malora.fused.kernels.down_tiling import aligned_rows, matmul_tn_fp32
from malora.fused.packed_weights import PackedLayout, PackedWeights
from malora.fused.recomputation import current_run, current_saving
from malora.fused.streams import run_on_parallel_streams, saturates_device
from malora.fused.tensor_utils import flatten_tokens
from malora.fused.weight_cache import GroupAdapter, GroupWeightCache
from malora.routing import Routing


def forward_group(adapter: GroupAdapter, x: Tensor) -> list[Tensor]:
    """Return the output [..., m] of each layer for x [..., n].

    The routing is left in the model's log.
    """
    config, layers, layout = adapter.config, adapter.layers, adapter.layout
    has_dropout = config.lora_dropout > 0 and layers[0].training
    seed = draw_seed(x.device) if has_dropout else None
    x_Tn, parameters, run = flatten_tokens(x), adapter.parameters(), current_run()
    dtype = x_Tn.dtype
    x_Tn = x_Tn.to(matmul_dtype_of((layer.base_layer for layer in layers), dtype))
    pack = partial(adapter.packed_for, x_Tn, parameters)
    packed = pack() if run is None else run.packed(id(adapter), pack)
    base = choose_base(adapter, packed, x_Tn, has_dropout=has_dropout)
    if run is not None and not run.needs_outputs:
        base = WithoutOutputs(base)
    if (saving := current_saving()) is not None:
        saving.keep_on_device(packed.flat, *base.saved())
    results = FusedExperts.apply(  # type: ignore[no-untyped-call]
        x_Tn, seed, config.lora_dropout, layout, packed, base, adapter.cache, *parameters
    )
    if run is not None:
        run.end_group()
    ys = [y.view(*x.shape[:-1], y.shape[1]).to(dtype) for y in results[: layout.G]]
    for i, probability in enumerate(results[layout.G :]):  # none without a router
        probability = probability.view(*x.shape[:-1], config.num_experts)
        routing = Routing(probability, config.top_k, config.renormalize)
        ys[i] = layers[i].record_routing(adapter.adapter, routing, ys[i])
    return ys


def draw_seed(device: torch.device) -> Tensor:
    """Return a seed of dropout masks, [1]. The second run of a checkpointed layer gets that of the first."""
    run, draw = current_run(), partial(torch.randint, 2**31 - 1, (1,), device=device)
    return draw() if run is None else run.seed(draw)


class FusedExperts(torch.autograd.Function):
    """Compute a projection group.

    Inputs: x [T, n]; dropout's seed [1] or None, and its probability; the layout; the packed weights; the frozen base;
    the group's cache; the parameters, each projection's in the order of the layout's kinds. Outputs: y [T, m] of each
    projection, then, with routers, the probabilities [T, N] of each.

    Nothing that the context keeps refers to a layer or a model: a routing that the model's log keeps leads to the
    context, and Python's garbage collector does not see cycles through the autograd graph.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seed: Tensor | None, p: float, layout: PackedLayout, packed: PackedWeights, base: Base,
        cache: GroupWeightCache, *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return the outputs and the router probabilities."""
        bits = None if seed is None else dropout.draw_mask(len(x), x.shape[1], seed, p)
        out = compute_outputs(layout, x, bits, p, packed, base)
        if out.x_and_h is not None:  # not to keep two copies of x
            x, out = _choose_x(x, layout, out)
        ctx.layout, ctx.p, ctx.base, ctx.cache = layout, p, base.for_backward(), cache
        ctx.set_materialize_grads(False)
        saved_h = out.h if layout.has_router else None  # else it is a part of down_out
        saved_weights = packed.down, packed.P, packed.flat, *packed.B
        ctx.save_for_backward(x, bits, out.down_out, saved_h, *saved_weights, *base.saved())
        return (*out.ys, *(() if out.probabilities is None else out.probabilities.unbind()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the parameters."""
        layout: PackedLayout = ctx.layout
        x, bits, down_out, h, down, P, flat, *rest = ctx.saved_tensors
        packed = PackedWeights(down, P, rest[: layout.G], flat)
        weights = ctx.base.weights_for_backward(rest[layout.G :])
        h = layout.by_projection(down_out) if h is None else h
        wanted = ctx.needs_input_grad[7:]
        trained = {kind for i, kind in enumerate(layout.kinds) if any(wanted[i :: len(layout.kinds)])}
        found = compute_gradients(
            layout, [*gradients[: layout.G]], _stack_grads(gradients[layout.G :], x, layout.gate.N), x, bits, ctx.p,
            down_out, h, packed, ctx.base, weights, trained, needs_dx=ctx.needs_input_grad[0],
            counters=ctx.cache.split_k_counters(x),
        )  # fmt: skip
        by_parameter = zip(parameter_gradients(layout, packed, found), wanted, strict=True)
        trained_only = (grad if needed else None for grad, needed in by_parameter)
        return (found.dx, None, None, None, None, None, None, *trained_only)


class GroupOutputs(NamedTuple):
    """Results of a group's forward pass."""

    ys: list[Tensor]  # of each projection, [T, m]
    probabilities: Tensor | None  # [G, T, N]; None without routers
    x_and_h: Tensor | None  # [T, n + G·H8], if the base reads x and h next to each other
    down_out: Tensor  # [T, G·(R8 + N8)]
    h: Tensor  # [G, T, H8]; a view of x_and_h if there is one, and of down_out without routers


def _choose_x(x: Tensor, layout: PackedLayout, out: GroupOutputs) -> tuple[Tensor, GroupOutputs]:
    """Return x as it is saved, and the outputs as they are.

    There are two copies of x, itself and the one next to h. Usually the one next to h is saved, and x is freed. In
    "lean" mode x is recomputed, so the other one is freed: what lies next to it is copied, which is narrow.
    """
    assert out.x_and_h is not None
    if current_saving() is None:
        return out.x_and_h[:, : x.shape[1]], out
    if layout.has_router:
        return x, out._replace(h=out.h.contiguous())
    down_out = aligned_rows(x, out.down_out.shape[1]).copy_(out.down_out)  # h is a view of it
    return x, out._replace(down_out=down_out)


class GroupGradients(NamedTuple):
    """Gradients of a group. Each is None if nobody needs it."""

    dx: Tensor | None  # [T, n]
    ddown: Tensor | None  # [G·(R8 + N8), n]
    dP: Tensor | None  # [G, N, r, D]
    dBs: list[Tensor] | None  # of each projection, [H8, m]


def compute_outputs(
    layout: PackedLayout, x: Tensor, bits: Tensor | None, p: float, packed: PackedWeights, base: Base
) -> GroupOutputs:
    """Compute a group's outputs.

    Args:
        layout: sizes.
        x: [T, n].
        bits: [T, ⌈n/32⌉] int32, dropout's mask; None without dropout.
        p: dropout's probability.
        packed: the packed weights.
        base: the frozen layers.
    """
    x_and_h = base.allocate_x_and_h(x)
    down = partial(_down_and_gate, layout, x, bits, p, packed, x_and_h)
    (down_out, h, probabilities), *_ = run_on_parallel_streams(x, [down, *base.load_up_proj(packed.B, layout.alpha)])
    ys = base.outputs(x if x_and_h is None else x_and_h, h, packed.B, layout.alpha)
    return GroupOutputs(ys, probabilities, x_and_h, down_out, h)


def compute_gradients(
    layout: PackedLayout, gradients: list[Tensor | None], d_probability: Tensor | None, x: Tensor, bits: Tensor | None,
    p: float, down_out: Tensor, h: Tensor, packed: PackedWeights, base: Base, weights: Iterable[Tensor],
    trained: Set[str], *, needs_dx: bool, counters: Tensor | None,
) -> GroupGradients:  # fmt: skip
    """Compute a group's gradients.

    Args:
        layout: sizes.
        gradients: of the outputs, each [T, m] or None.
        d_probability: of the router probabilities, [G, T, N] or None.
        x: [T, n], with any row stride.
        bits: dropout's mask, as in the forward pass.
        p: dropout's probability.
        down_out: from the forward pass, as is h.
        h: [G, T, H8].
        packed: the packed weights of the forward pass.
        base: the frozen layers.
        weights: their weights [m, n], where the base does not compute the gradient of x.
        trained: the kinds of parameters that want a gradient.
        needs_dx: whether x wants one.
        counters: from `split_k_counters`; None allocates them.
    """
    alpha, Bs, down = layout.alpha, packed.B, packed.down
    dys = [
        x.new_zeros(len(x), B.shape[1]) if dy is None else dy.contiguous() for dy, B in zip(gradients, Bs, strict=True)
    ]
    d_down_out = aligned_rows(x, len(down))
    if layout.has_gaps:
        d_down_out.zero_()
    dh = None if layout.has_router else layout.by_projection(d_down_out)
    joint = base.joint_gradients(dys, Bs, alpha) if needs_dx else None
    dx_base, dh, dBs = _gradients_of_h(layout, x, dys, h, dh, Bs, joint, needs_dB="B" in trained)
    gated_dh = None
    if layout.has_router:
        gated_dh = gate.gate_backward(down_out, packed.P, dh, d_probability, d_down_out, layout.gate)

    def input_and_down() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        subspace = layout.subspace_grad(gated_dh, down_out) if "P" in trained and gated_dh is not None else None
        found = down_proj_backward(
            d_down_out, x, bits, down, layout.gate.logits_at, p, dx_base, needs_dx=needs_dx,
            needs_dweights=bool(trained & {"A", "S", "router"}), subspace=subspace, counters=counters,
        )  # fmt: skip
        if found[0] is not None:
            for dy, W in zip(dys, weights, strict=False):  # none where dx_base has them
                found[0].addmm_(dy, W)
        return found

    def up() -> list[Tensor] | None:
        return _up_proj_weight_grads(h, dys, alpha) if dBs is None and "B" in trained else dBs

    (dx, ddown, dP), dBs = run_on_parallel_streams(x, [input_and_down, up])
    return GroupGradients(dx, ddown, None if dP is None else layout.dP_by_expert(dP), dBs)


def parameter_gradients(layout: PackedLayout, packed: PackedWeights, found: GroupGradients) -> list[Tensor]:
    """Return the gradient of each parameter, as views.

    They are in the order in which the parameters are passed around. A parameter that has no gradient gets its weight.
    """
    down = packed.down if found.ddown is None else found.ddown
    P = packed.P if found.dP is None else found.dP
    Bs = found.dBs or packed.B
    return [grad for g in range(layout.G) for grad in layout.views(down, P, Bs[g], g)]


def _down_and_gate(
    layout: PackedLayout, x: Tensor, bits: Tensor | None, p: float, packed: PackedWeights, x_and_h: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return down_out, h and the probabilities [G, T, N].

    With `x_and_h`, x and h are written there. Without a router, h is a view of down_out.
    """
    s, down, G = layout.gate, packed.down, layout.G
    x_copy, h_memory = (None, None) if x_and_h is None else x_and_h.tensor_split([x.shape[1]], 1)
    splits = None
    if bits is None:
        down_out = torch.mm(x, down.T, out=aligned_rows(x, len(down)))
    elif layout.has_router:
        down_out, splits = down_forward.dropout_matmul_split_k(x, bits, down, s.logits_at, p, x_copy)
    else:
        down_out = down_forward.dropout_matmul(x, bits, down, s.logits_at, p, x_copy, h_memory)
    if not layout.has_router:
        return down_out, layout.by_projection(down_out), None
    if h_memory is None:
        h = x.new_empty(G, len(x), layout.H8)
    else:
        h = h_memory.unflatten(1, (G, layout.H8)).transpose(0, 1)
    if layout.has_gaps:
        h.zero_()
    return down_out, h, gate.gate(down_out, packed.P, h, s, splits)


def _gradients_of_h(
    layout: PackedLayout, x: Tensor, dys: list[Tensor], h: Tensor, dh: Tensor | None, Bs: list[Tensor],
    joint: tuple[Tensor, Tensor] | None, *, needs_dB: bool,
) -> tuple[Tensor | None, Tensor, list[Tensor] | None]:  # fmt: skip
    """Return the base's part of dx, dh [G, T, H8], and the gradients of the Bs.

    The first and the last are None if they are computed elsewhere.

    Args:
        layout: sizes.
        x: the input.
        dys: gradients of the outputs, each [T, m].
        h: gated outputs, [G, T, H8].
        dh: memory to write dh to; None for new memory.
        Bs: the up projections, each [H8, m].
        joint: dx and dh, if the base computes both at once.
        needs_dB: whether any B is trained.
    """
    if joint is not None:
        dx_base, made = joint
        return dx_base, made if dh is None else dh.copy_(made), None
    dh = x.new_empty(h.shape) if dh is None else dh
    pairs = zip(dys, h, strict=True)
    if saturates_device(x) and needs_dB and all(up_backward.is_profitable(dy, h_g, layout.H8) for dy, h_g in pairs):
        return None, dh, up_backward.up_proj_backward(dys, h, Bs, layout.alpha, dh)

    def of_projection(dh_g: Tensor, dy: Tensor, B: Tensor) -> None:
        torch.addmm(dh_g, dy, B.T, beta=0, alpha=layout.alpha, out=dh_g)

    # The gate waits for dh alone, so the gradients of B come later.
    operands = zip(dh, dys, Bs, strict=True)
    run_on_parallel_streams(x, [partial(of_projection, *of_each) for of_each in operands])
    return None, dh, None


def _up_proj_weight_grads(h: Tensor, dys: list[Tensor], alpha: float) -> list[Tensor]:
    """Return alpha · hᵀ dy of each projection, [H8, m]."""
    made = [matmul_tn_fp32(h_g, dy) for h_g, dy in zip(h, dys, strict=True)]
    if alpha != 1:
        torch._foreach_mul_(made, alpha)
    return made


def _stack_grads(gradients: tuple[Tensor | None, ...], x: Tensor, N: int) -> Tensor | None:
    """Return the gradients of the probabilities as [G, T, N].

    Return None if no projection has one.
    """
    if all(gradient is None for gradient in gradients):
        return None
    present = [gradient for gradient in gradients if gradient is not None]
    if len(present) < len(gradients):
        zero = x.new_zeros(len(x), N, dtype=torch.promote_types(x.dtype, torch.float32))
        return torch.stack([zero if gradient is None else gradient for gradient in gradients])
    if _lie_stacked(present):  # as a balance loss over all layers leaves them
        first = present[0]
        return first.as_strided((len(present), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(present)


def _lie_stacked(tensors: list[Tensor]) -> bool:
    """Return whether tensors of one shape lie in memory as `torch.stack` puts them."""
    first, storages = tensors[0], {tensor.untyped_storage().data_ptr() for tensor in tensors}
    places = [first.storage_offset() + place * first.numel() for place in range(len(tensors))]
    is_contiguous = all(tensor.is_contiguous() for tensor in tensors)
    return is_contiguous and len(storages) == 1 and [tensor.storage_offset() for tensor in tensors] == places
