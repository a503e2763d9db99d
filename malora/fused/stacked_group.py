"""Forward and backward of a projection group with stacked adapters, the frozen layers included.

`autograd.py` does this for one adapter, in kernels that read the weights of one adapter. Here every adapter has tokens
and weights of its own, so its matmuls are batched ones:

1. The down projections of all layers are one matmul over x after dropout, the routers one over x.
2. The gate kernel turns the logits into gates and applies them at rank width: `h`.
3. Each frozen layer computes x Wᵀ over all tokens, and the batched matmul of the up projection adds h B to it in place.

Backward, in reverse order. All contributions to the gradient of x are added by the matmuls that make them. As sums of
autograd, these and the one in step 3 would cost more than the matmuls.

| symbol | meaning | size |
| --- | --- | --- |
| K, T | adapters, tokens of each | |
| n, m | input features, output features | |
| G, N, r | projections, experts, rank | H = N·r |
| R | rows of a projection's down projection | d with a subspace, else H |
| z | outputs of the down projections | [K, T, G·R] |
| down_out | expert outputs of all projections, then router logits | [K, T, G·(H + N)] |
| h | gated expert outputs | [G, K, T, H] |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.config import MaloraConfig
from malora.factors import StackedWeights
from malora.fused.autograd import draw_seed
from malora.fused.kernels.down_tiling import aligned_rows, split_count
from malora.fused.kernels.dropout import apply_dropout, draw_mask
from malora.fused.kernels.gate import GateLayout, gate, gate_backward
from malora.fused.protocol import FusedLayer
from malora.fused.tensor_utils import cdiv

TILE = 128  # rows and columns of a result that one processor computes, about
MIN_TOKENS_PER_SPLIT = 256  # below, starting a matmul takes as long as its sum


class _Sizes(NamedTuple):
    """What `_StackedGroup` must know besides tensors."""

    G: int
    N: int
    H: int
    has_router: bool
    has_P: bool
    p: float  # dropout's probability
    scaling: float
    gate: GateLayout

    @property
    def alpha(self) -> float:
        """Factor of the up projection. With a router the gates have the scaling."""
        return 1.0 if self.has_router else self.scaling


def forward_stacked_group(
    layers: list[FusedLayer], weights: StackedWeights, config: MaloraConfig, x: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the outputs of frozen layers with stacked adapters.

    Args:
        layers: The layers of the weights' group.
        weights: Weights of K adapters, in the dtype of x.
        config: Settings of the adapters.
        x: [K·R, ..., n], the rows of the first adapter first.

    Returns:
        Output of each layer, [K·R, ..., m]; and its router probabilities, [K, T, N]. There are none without a router.
    """
    G, K = len(layers), len(weights.down)
    N, r, H = config.num_experts, config.r, config.num_experts * config.r
    gating = GateLayout(
        N=N, top_k=config.top_k, r=r, D=r, z_step=r, z_group=H, l_group=N, logits_at=G * H, has_p=False,
        scaling=config.unmatched_scaling, renormalize=config.renormalize,
    )  # fmt: skip
    has_P = weights.factors[0].P is not None
    p = config.lora_dropout if layers[0].training else 0.0
    sizes = _Sizes(G, N, H, weights.router is not None, has_P, p, config.unmatched_scaling, gating)
    seed = draw_seed(x.device) if p > 0 else None
    bases = [tensor for layer in layers for tensor in (layer.base_layer.weight, layer.base_layer.bias)]
    adapters = [tensor for factors in weights.factors for tensor in (factors.P, factors.B)]
    x_KTn = x.reshape(K, -1, x.shape[-1])
    results = _StackedGroup.apply(sizes, seed, x_KTn, weights.router, weights.down, *bases, *adapters)  # type: ignore[no-untyped-call]
    return [y.view(*x.shape[:-1], -1) for y in results[:G]], [*results[G:]]


class _StackedGroup(torch.autograd.Function):
    """Compute a projection group.

    Inputs: the sizes; dropout's seed [1] or None; x [K, T, n]; the routers [K, G·N, n] or None; the down projections
    [K, G·R, n]; weight [m, n] and bias [m] or None of each frozen layer; P [K, N, r, d] or None and B [K, N, r, m] of
    each layer. Outputs: y [K, T, m] of each layer, then, with routers, the probabilities [K, T, N] of each.
    """

    @staticmethod
    def forward(
        ctx: Any, sizes: _Sizes, seed: Tensor | None, x: Tensor, router: Tensor | None, down: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        G, H = sizes.G, sizes.H
        Ws, biases, Ps, Bs = tensors[: 2 * G : 2], tensors[1 : 2 * G : 2], tensors[2 * G :: 2], tensors[2 * G + 1 :: 2]
        (K, T, n), dropped, bits = x.shape, x, None
        if seed is not None:
            bits = draw_mask(K * T, n, seed, sizes.p)
            dropped = apply_dropout(x.flatten(0, 1), bits, sizes.p).view(x.shape)
        down_out = _aligned(x, G * H + (0 if router is None else G * sizes.N))
        expert_out, logits = down_out[..., : G * H], down_out[..., G * H :]
        if sizes.has_P:
            z = torch.bmm(dropped, down.mT)
            for z_g, P, out in zip(z.chunk(G, -1), Ps, expert_out.chunk(G, -1), strict=True):
                assert P is not None
                torch.bmm(z_g, P.flatten(1, 2).mT, out=out)
        else:
            z = torch.bmm(dropped, down.mT, out=expert_out)
        if router is None:
            h, probabilities = [*expert_out.chunk(G, -1)], None
        else:
            torch.bmm(x, router.mT, out=logits)
            h_memory = x.new_empty(G, K * T, H)
            probabilities = gate(down_out.flatten(0, 1), None, h_memory, sizes.gate)
            h = [*h_memory.view(G, K, T, H)]
        ys = []
        for W, bias, h_g, B in zip(Ws, biases, h, Bs, strict=True):
            assert W is not None and B is not None
            ys.append(torch.nn.functional.linear(x, W, bias).baddbmm_(h_g, B.flatten(1, 2), alpha=sizes.alpha))
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        saved_h = h_memory if router is not None else None
        ctx.save_for_backward(
            x, None if bits is None else dropped, bits, z if sizes.has_P else None, down_out, saved_h, router, down,
            *Ws, *Ps, *Bs,
        )  # fmt: skip
        routed = () if probabilities is None else (one.view(K, T, sizes.N) for one in probabilities)
        return *ys, *routed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        sizes: _Sizes = ctx.sizes
        G, H, N = sizes.G, sizes.H, sizes.N
        x, dropped, bits, z, down_out, h, router, down, *rest = ctx.saved_tensors
        Ws, Ps, Bs = rest[:G], rest[G : 2 * G], rest[2 * G :]
        dropped = x if dropped is None else dropped
        (K, T, n), needed = x.shape, ctx.needs_input_grad
        dys = [
            x.new_zeros(K, T, B.shape[-1]) if dy is None else dy.contiguous()
            for dy, B in zip(gradients[:G], Bs, strict=True)
        ]
        hs = down_out.chunk(G, -1) if h is None else h.view(G, K, T, H).unbind()

        d_down_out = _aligned(x, down_out.shape[-1])
        d_expert_out = d_down_out[..., : G * H].chunk(G, -1)
        dh = None if h is None else torch.empty_like(h)
        targets = d_expert_out if dh is None else dh.view(G, K, T, H).unbind()
        for dy, B, target in zip(dys, Bs, targets, strict=True):
            torch.baddbmm(target, dy, B.flatten(1, 2).mT, beta=0, alpha=sizes.alpha, out=target)
        dBs = [_matmul_tn(h_g, dy, sizes.alpha).view(B.shape) for h_g, dy, B in zip(hs, dys, Bs, strict=True)]
        if dh is not None:
            d_probability = _stack(gradients[G:], (K, T, N), x)
            flat = down_out.flatten(0, 1), d_down_out.flatten(0, 1)
            gate_backward(flat[0], None, dh, d_probability, flat[1], sizes.gate)

        dz = d_down_out[..., : G * H]
        dPs: list[Tensor | None] = [None] * G
        if sizes.has_P:
            if needed[5 + 2 * G]:
                pairs = zip(d_expert_out, z.chunk(G, -1), Ps, strict=True)
                dPs = [_matmul_tn(d, z_g).view(P.shape) for d, z_g, P in pairs]
            dz = torch.empty_like(z)
            for d, P, target in zip(d_expert_out, Ps, dz.chunk(G, -1), strict=True):
                torch.bmm(d, P.flatten(1, 2), out=target)
        d_logits = d_down_out[..., G * H :]
        ddown = _matmul_tn(dz, dropped) if needed[4] else None
        drouter = _matmul_tn(d_logits, x) if needed[3] else None
        dx = None
        if needed[2]:
            dx = torch.bmm(dz, down)
            if bits is not None:
                dx = apply_dropout(dx.flatten(0, 1), bits, sizes.p).view(x.shape)
            if router is not None:
                dx.baddbmm_(d_logits, router)
            for dy, W in zip(dys, Ws, strict=True):
                dx.view(K * T, n).addmm_(dy.view(K * T, -1), W)
        adapters = [gradient for pair in zip(dPs, dBs, strict=True) for gradient in pair]
        return None, None, dx, drouter, ddown, *[None] * (2 * G), *adapters


def _matmul_tn(left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """Return alpha · leftᵀ @ right, [K, a, b], for left [K, T, a] and right [K, T, b].

    Each result is small, so it occupies few of the GPU's processors while it sums over all tokens. Therefore the tokens
    are divided among more matmuls, whose results are then added up.
    """
    (K, T, a), b = left.shape, right.shape[-1]
    splits = split_count(K * cdiv(a, TILE) * cdiv(b, TILE), max(1, T // MIN_TOKENS_PER_SPLIT))
    while T % splits:
        splits //= 2
    parts = (torch.unflatten(one, 1, (splits, T // splits)).flatten(0, 1) for one in (left, right))
    product = torch.bmm(next(parts).mT, next(parts))
    if splits > 1:
        product = torch.unflatten(product, 0, (K, splits)).sum(1)
    return product if alpha == 1 else product * alpha


def _aligned(x: Tensor, columns: int) -> Tensor:
    """Return uninitialized memory [K, T, columns] for x [K, T, n], with rows as in `aligned_rows`."""
    return torch.unflatten(aligned_rows(x.flatten(0, 1), columns), 0, x.shape[:2])


def _stack(gradients: tuple[Tensor | None, ...], shape: tuple[int, int, int], like: Tensor) -> Tensor | None:
    """Return the gradients [K, T, N] of the probabilities of all layers as [G, K·T, N]; None if there are none."""
    if all(gradient is None for gradient in gradients):
        return None
    wide = torch.promote_types(like.dtype, torch.float32)
    found = [like.new_zeros(shape, dtype=wide) if gradient is None else gradient for gradient in gradients]
    return (torch.stack(found) if len(found) > 1 else found[0].contiguous()[None]).flatten(1, 2)
