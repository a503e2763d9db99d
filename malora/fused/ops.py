"""The fused path as operations of torch, for torch.compile and torch.export.

Three operations, each with an implementation for tensors without data:

| operation | result |
| --- | --- |
| `malora::pack_weights` | a group's parameters in one flat buffer, as the GEMMs read them |
| `malora::dropout_mask` | the mask of an input, as bits |
| `malora::experts` | outputs, router probabilities, and what the backward pass needs |

`malora::experts` has a gradient, computed by `malora::experts_backward`. A partitioner may recompute each of them.
Eager passes do not come here: `FusedExperts` does the same with less work for the host.

Operations take tensors and numbers only. So the layout travels as the numbers of `layout_sizes`.

Shapes: T tokens, n in, m out, G projections. See `autograd.py` for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

from malora.fused.augmented_weights import has_padding
from malora.fused.autograd import GroupGradients, compute_gradients, compute_outputs, parameter_gradients
from malora.fused.bases import AugmentedBase, PlainBase
from malora.fused.kernels import dropout
from malora.fused.packed_weights import PackedBuffer, PackedLayout, layout_sizes
from malora.fused.tensor_utils import flatten_tokens, round_up
from malora.fused.weight_cache import GroupAdapter, GroupWeightCache, group_parameters
from malora.routing import Routing

if TYPE_CHECKING:
    from malora.fused.protocol import FusedLayer


@library.custom_op(
    "malora::pack_weights", mutates_args=(), schema="(Tensor[] parameters, int[] sizes, ScalarType dtype) -> Tensor"
)
def pack_weights(parameters: list[Tensor], sizes: list[int], dtype: torch.dtype) -> Tensor:
    """Return a group's parameters in one flat buffer of `dtype`, [elements]."""
    buffer = PackedBuffer([_layout(sizes)], dtype, parameters[0].device)
    buffer.fill(parameters, {})
    return buffer.flat


@pack_weights.register_fake
def _(parameters: list[Tensor], sizes: list[int], dtype: torch.dtype) -> Tensor:
    return parameters[0].new_empty(_layout(sizes).size, dtype=dtype)


@library.custom_op("malora::dropout_mask", mutates_args=(), schema="(Tensor x, Tensor seed, float p) -> Tensor")
def dropout_mask(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return the dropout mask of x [T, n] as bits, [T, ⌈n/32⌉] int32."""
    return dropout.draw_mask(len(x), x.shape[1], seed, p)


@dropout_mask.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape[0], round_up(x.shape[1], 32) // 32, dtype=torch.int32)


@library.custom_op(
    "malora::experts",
    mutates_args=(),
    schema="(Tensor x, Tensor? bits, float p, Tensor flat, Tensor[] weights, Tensor?[] biases, Tensor[] parameters, "
    "int[] sizes, float scaling, bool is_augmented, bool is_loaded) -> Tensor[]",
)
def experts(
    x: Tensor, bits: Tensor | None, p: float, flat: Tensor, weights: list[Tensor], biases: list[Tensor | None],
    parameters: list[Tensor], sizes: list[int], scaling: float, is_augmented: bool, is_loaded: bool,
) -> list[Tensor]:  # fmt: skip
    """Compute a group.

    Args:
        x: [T, n], contiguous, in the dtype of the matmuls.
        bits: from `dropout_mask`; None without dropout.
        p: probability of dropout.
        flat: from `pack_weights`.
        weights: of the frozen layers, [m, n], in the dtype of x.
        biases: of the frozen layers, [m] or None.
        parameters: those that were packed. They are not read, they get the gradients.
        sizes: from `layout_sizes`.
        scaling: the method's scaling.
        is_augmented: whether the weights have padded columns (`augmented_weights.py`) that are to be used.
        is_loaded: whether the up projection is in them already.

    Returns:
        y of each projection, [T, m]. With routers the probabilities [G, T, N] and down_out. At last h, or, if the
        weights are augmented, x and h next to each other. Without routers h is down_out.
    """
    layout = _layout(sizes, scaling)
    base = PlainBase(weights, biases)
    if is_augmented:
        columns = [W.as_strided((len(W), W.stride(0)), W.stride()) for W in weights]
        base = AugmentedBase(weights, biases, columns, layout.H8, is_loaded)
    out = compute_outputs(layout, x, bits, p, layout.unpack(flat), base)
    kept = [] if out.x_and_h is None else [out.x_and_h]
    probabilities = [] if out.probabilities is None else [out.probabilities]
    if not layout.has_router:  # down_out is h then, and may lie next to x
        return [*out.ys, *(kept or [out.down_out])]
    return [*out.ys, *probabilities, out.down_out, *(kept or [out.h])]


@experts.register_fake
def _(
    x: Tensor, bits: Tensor | None, p: float, flat: Tensor, weights: list[Tensor], biases: list[Tensor | None],
    parameters: list[Tensor], sizes: list[int], scaling: float, is_augmented: bool, is_loaded: bool,
) -> list[Tensor]:  # fmt: skip
    layout, T = _layout(sizes, scaling), x.shape[0]
    gate = layout.gate
    made = [x.new_empty(T, m) for m in layout.out_features]
    if layout.has_router:
        made.append(x.new_empty(layout.G, T, gate.N, dtype=torch.promote_types(x.dtype, torch.float32)))
    down_out = _aligned(x, layout.G * (gate.z_group + gate.l_group))
    if layout.has_router:
        made.append(down_out)
    if is_augmented:
        return [*made, _aligned(x, layout.n + layout.G * layout.H8)]
    made.append(x.new_empty(layout.G, T, layout.H8) if layout.has_router else down_out)
    return made


@library.custom_op(
    "malora::experts_backward",
    mutates_args=(),
    schema="(Tensor?[] dys, Tensor? d_probability, Tensor x, Tensor? bits, float p, Tensor? down_out, Tensor? h, "
    "Tensor flat, Tensor[] weights, int[] sizes, float scaling, bool needs_dx, bool[] trained) -> Tensor[]",
)
def experts_backward(
    dys: list[Tensor | None], d_probability: Tensor | None, x: Tensor, bits: Tensor | None, p: float,
    down_out: Tensor | None, h: Tensor | None, flat: Tensor, weights: list[Tensor], sizes: list[int], scaling: float,
    needs_dx: bool, trained: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the gradients of `experts`.

    Args:
        dys: gradients of the outputs, each [T, m] or None.
        d_probability: of the probabilities, [G, T, N] or None.
        x: x [T, n], or with augmented weights x and h next to each other.
        bits: as in the forward pass, as are p, flat, weights, sizes and scaling.
        p: see above.
        down_out: from the forward pass; None without routers.
        h: from the forward pass: [G, T, H8], or without routers all of down_out. None if it lies next to x.
        flat: see above.
        weights: see above.
        sizes: see above.
        scaling: see above.
        needs_dx: whether x wants a gradient.
        trained: for each of the layout's kinds, whether such parameters want one.

    Returns:
        Those gradients that are needed: dx [T, n]; that of the down projections and routers
        [G·(R8 + N8), n]; that of P [G, N, r, D]; those of the up projections, each [H8, m].
    """
    layout = _layout(sizes, scaling)
    n = layout.n
    h = x[:, n:] if h is None else h
    down_out = h if down_out is None else down_out
    if d_probability is not None:  # a mean leaves one number that is expanded
        d_probability = d_probability.contiguous()
    if h.dim() == 2:  # its projections are columns
        h = h.unflatten(1, (layout.G, layout.H8)).transpose(0, 1)
    kinds = {kind for kind, found in zip(layout.kinds, trained, strict=True) if found}
    dx, ddown, dP, dBs = compute_gradients(
        layout, dys, d_probability, x[:, :n], bits, p, down_out, h, layout.unpack(flat), PlainBase([], []), weights,
        kinds, needs_dx=needs_dx, counters=None,
    )  # fmt: skip
    found = [dx, ddown, None if dP is None else dP.contiguous(), *(dBs or [])]
    return [*_without_aliases(gradient for gradient in found if gradient is not None)]


@experts_backward.register_fake
def _(
    dys: list[Tensor | None], d_probability: Tensor | None, x: Tensor, bits: Tensor | None, p: float,
    down_out: Tensor | None, h: Tensor | None, flat: Tensor, weights: list[Tensor], sizes: list[int], scaling: float,
    needs_dx: bool, trained: list[bool],
) -> list[Tensor]:  # fmt: skip
    layout = _layout(sizes, scaling)
    kinds = {kind for kind, found in zip(layout.kinds, trained, strict=True) if found}
    wide = torch.promote_types(x.dtype, torch.float32)
    G, gate = layout.G, layout.gate
    made = [x.new_empty(x.shape[0], layout.n)] if needs_dx else []
    if kinds & {"A", "S", "router"}:
        made.append(x.new_empty(G * (gate.z_group + gate.l_group), layout.n, dtype=wide))
    if "P" in kinds:
        made.append(x.new_empty(G, gate.N, gate.r, gate.D, dtype=wide))
    if "B" in kinds:
        made += [x.new_empty(layout.H8, m, dtype=wide) for m in layout.out_features]
    return made


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, bits, p, flat, weights, biases, _, sizes, scaling, is_augmented, _ = inputs
    layout = _layout(sizes, scaling)
    down_out = output[layout.G + 1] if layout.has_router else None
    ctx.p, ctx.sizes, ctx.scaling, ctx.has_biases = p, sizes, scaling, None not in biases
    ctx.set_materialize_grads(False)
    x, h = (output[-1], None) if is_augmented else (x, output[-1])
    ctx.save_for_backward(x, bits, down_out, h, flat, *weights)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    layout = _layout(ctx.sizes, ctx.scaling)
    x, bits, down_out, h, flat, *weights = ctx.saved_tensors
    needs_dx, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
    trained = [any(wanted[i :: len(layout.kinds)]) for i in range(len(layout.kinds))]
    G = layout.G
    d_probability = gradients[G] if layout.has_router else None
    made = experts_backward(
        gradients[:G], d_probability, x, bits, ctx.p, down_out, h, flat, weights, ctx.sizes, ctx.scaling, needs_dx,
        trained,
    )  # fmt: skip
    kinds = {kind for kind, found in zip(layout.kinds, trained, strict=True) if found}
    rest = iter(made)
    dx = next(rest) if needs_dx else None
    ddown = next(rest) if kinds & {"A", "S", "router"} else None
    dP = next(rest) if "P" in kinds else None
    found = GroupGradients(dx, ddown, dP, [*rest] or None)
    views = parameter_gradients(layout, layout.unpack(flat), found)
    by_parameter = [gradient if needed else None for gradient, needed in zip(views, wanted, strict=True)]
    frozen = [None] * len(weights)
    # torch takes a list with a None in it for one argument without a gradient.
    return (dx, None, None, None, frozen, frozen if ctx.has_biases else None, by_parameter, None, None, None, None)


experts.register_autograd(_backward, setup_context=_setup_context)


def _layout(sizes: list[int], scaling: float = 1.0) -> PackedLayout:
    return PackedLayout.from_sizes(tuple(sizes), scaling)


def _aligned(x: Tensor, columns: int) -> Tensor:
    """Return memory as `aligned_rows` does; its length may be symbolic."""
    return x.new_empty(x.shape[0], round_up(columns, 16))[:, :columns]


def _without_aliases(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    """Copy tensors that share memory with an earlier one; an operation must not return such."""
    seen = set()
    for tensor in tensors:
        address = tensor.untyped_storage().data_ptr()
        yield tensor.clone() if address in seen else tensor
        seen.add(address)


def forward_group_traced(
    layers: list[FusedLayer], adapter: str, x: Tensor, cache: GroupWeightCache | None, kept: GroupAdapter | None
) -> list[Tensor]:
    """Do what `forward_group` does, in operations that a compiler can trace.

    Args:
        layers: the layers to compute together.
        adapter: name of the adapter.
        x: [..., n].
        cache: the group's copies of weights, if it has any.
        kept: what keeps packed weights of the adapter; None packs them in this pass.
    """
    config, first = layers[0].settings[adapter], layers[0]
    x_Tn, sizes = flatten_tokens(x), layout_sizes(layers, adapter)
    parameters = group_parameters(layers, adapter)
    shared = None
    if kept is not None and torch.is_grad_enabled():
        shared = kept.take_shared((x_Tn.dtype, x_Tn.device))
    has_dropout = config.lora_dropout > 0 and first.training
    H8 = round_up(config.num_experts * config.r, 8)
    is_augmented = is_loaded = False
    if cache is not None and has_dropout and x_Tn.dtype == first.base_layer.weight.dtype:
        is_augmented = has_padding(layers, cache, H8)
    if cache is not None and is_augmented:
        is_loaded = shared is not None and cache.loaded_for(shared, None) is not None
        cache.loaded = cache.loaded if is_loaded else None
    flat = pack_weights([p.detach() for p in parameters], sizes, x_Tn.dtype) if shared is None else shared.flat
    bits = None
    if has_dropout:
        bits = dropout_mask(x_Tn, torch.randint(2**31 - 1, (1,), device=x.device), config.lora_dropout)
    made = experts(
        x_Tn, bits, config.lora_dropout, flat, [layer.base_layer.weight.to(x_Tn.dtype) for layer in layers],
        [layer.base_layer.bias for layer in layers], parameters, sizes, config.scaling, is_augmented, is_loaded,
    )  # fmt: skip
    ys, rest = made[: len(layers)], made[len(layers) :]
    ys = [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    if config.has_router:
        for i, probability in enumerate(rest[0].unbind()):
            probability = probability.view(*x.shape[:-1], config.num_experts)
            routing = Routing(probability, config.top_k, config.renormalize)
            ys[i] = layers[i].record_routing(adapter, routing, ys[i])
    return ys
