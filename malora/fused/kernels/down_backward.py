"""Backward pass of the fused dropout and down projection.

    dx = dropout(dz Wd) + dlogits Wr + dx_base
    dWd = dzᵀ dropout(x)        dWr = dlogitsᵀ x        dP = gated_dhᵀ z

All of it is one launch. dx and the weight gradients need the same tiles of x's gradient, mask and weights, and dP is
too small to fill a GPU alone.

1. A program takes a tile of in features and loops over the tiles of tokens. It keeps its columns of the weights in
   shared memory and its columns of dWd and dWr in registers.
2. In each step it loads d_down_out = [dz, dlogits] and the mask words of a tile of tokens, stores the tile of dx and
   accumulates dWd and dWr.
3. A few more programs have no in features. They compute dP (`_subspace_grad`), one projection after another.
4. The tokens are split (split-K), so that enough programs run. Each split writes partial sums in float32.
5. The last split to finish, known by a counter in global memory, adds the partial sums in the order of the splits
   (`_sum_splits`). So the result does not depend on the order in which programs finish, and no second launch is needed.

| symbol | meaning | size |
| --- | --- | --- |
| T, n | tokens, in features | |
| G, H, D | projections, total rank of one's experts, columns of its P (only for dP) | |
| Z, L | rows of the stacked down projections and of the stacked routers | |
| W | mask words per token | ⌈n/32⌉ |
| x | input | [T, n] |
| bits | dropout mask, see `dropout.py` | [T, W] int32 |
| weights (w) | down projections Wd above routers Wr | [Z + L, n] |
| d_down_out (d_out) | gradient of down_out: columns dz, dlogits | [T, Z + L] |
| dx_base | what is added to dx, for example dy W of the base layers | [T, n] |
| gated_dh | gradient of P z, see `gate.py` | [G, T, ≥H] |
| z | output of the down projections | [G, T, ≥D] |
| splits | partial sums of all weight gradients, flattened: dWd, dWr, dP | [splits, elements] float32 |
| head, tail | first and second tile of the Z rows | PAD_HEAD, PAD_TAIL |

Accumulators are float32, or float64 for float64 data. Separate cuBLAS calls would read x, d_down_out and the mask once
for each gradient, and write the dropped-out x and dx in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels import down_tiling, tiling
from malora.fused.kernels.down_tiling import matmul_tn_fp32, prefers_plain_matmul, split_count, tile_constants
from malora.fused.kernels.dropout import apply_dropout, mask_tile
from malora.fused.kernels.launch import launch
from malora.fused.kernels.tiling import MIN_RIGHT_COLUMNS, tile_size, wait_for_dot
from malora.fused.tensor_utils import cdiv, next_power_of_2

# Programs that compute dP. With one, it would finish last where three projections are computed together.
MAX_SUBSPACE_PROGRAMS = 2
MAX_SUBSPACE_ELEMENTS = 128 * 64  # largest padded dP of a projection whose accumulators fit into registers


@triton.jit
def _subspace_grad(
    gated_dh_ptr, z_ptr, dp_ptr, tokens, T, gated_dh_stride, z_stride, T_PER_SPLIT: tl.constexpr, EVEN_T: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, PAD_H: tl.constexpr, PAD_D: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Compute one split of dP = gated_dhᵀ z [H, D] of one projection."""
    ranks, columns = tl.arange(0, PAD_H), tl.arange(0, PAD_D)
    gated_dh_ptr += tokens[:, None] * gated_dh_stride + ranks[None, :]
    z_ptr += tokens[:, None] * z_stride + columns[None, :]
    acc = tl.zeros([PAD_H, PAD_D], dtype=ACC)
    for start in range(0, T_PER_SPLIT, BLOCK_T):
        t_mask = (tokens + start < T)[:, None] | EVEN_T
        gated_dh = tl.load(gated_dh_ptr, mask=t_mask & (ranks < H)[None, :], other=0.0)
        z = tl.load(z_ptr, mask=t_mask & (columns < D)[None, :], other=0.0)
        acc = wait_for_dot(tl.dot(tl.trans(gated_dh), z, acc, input_precision="ieee", out_dtype=ACC), PTX)
        gated_dh_ptr += BLOCK_T * gated_dh_stride
        z_ptr += BLOCK_T * z_stride
    tl.store(dp_ptr + ranks[:, None] * D + columns[None, :], acc, mask=(ranks < H)[:, None] & (columns < D)[None, :])


@triton.jit
def _is_last_split(counter_ptr, splits):
    """Count this program, and return whether it is the last of `splits`.

    After the last one the counter is zero again.
    """
    tl.debug_barrier()  # all stores of the program's threads come before its count
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == splits - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _sum_splits(splits_ptr, sum_ptr, columns, n_mask, row_stride, split_stride, splits, ROWS: tl.constexpr,
                MAX_SPLITS: tl.constexpr):  # fmt: skip
    """Add the partial sums of ROWS rows in the order of the splits.

    The loop over MAX_SPLITS is unrolled, so that the loads of all splits are in flight at once. `.cg` reads from the L2
    cache, where the other programs' stores are visible.
    """
    for first in range(0, ROWS, 16):
        rows = first + tl.arange(0, 16)
        offsets = rows[:, None] * row_stride + columns[None, :]
        mask = (rows < ROWS)[:, None] & n_mask
        total = tl.load(splits_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        for split in tl.static_range(1, MAX_SPLITS):
            exists = (rows < tl.where(split < splits, ROWS, 0))[:, None] & n_mask
            total += tl.load(splits_ptr + split * split_stride + offsets, mask=exists, other=0.0, cache_modifier=".cg")
        tl.store(sum_ptr + offsets, total, mask=mask)


@triton.jit
def _down_proj_backward_kernel(
    d_out_ptr, x_ptr, bits_ptr, w_ptr, dx_base_ptr, dx_ptr, splits_ptr, sum_ptr, counter_ptr, gated_dh_ptr, z_ptr, T, n,
    W, d_out_stride, x_stride, dx_base_stride, gated_dh_stride, gated_dh_group_stride, z_stride, z_group_stride,
    split_stride, G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAD_H: tl.constexpr, PAD_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr, T_PER_SPLIT: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DW: tl.constexpr,
    HAS_DX_BASE: tl.constexpr, EVEN_T: tl.constexpr, EVEN_N: tl.constexpr, SCALE: tl.constexpr, Z: tl.constexpr,
    TAIL: tl.constexpr, L: tl.constexpr, PAD_HEAD: tl.constexpr, PAD_TAIL: tl.constexpr, PAD_L: tl.constexpr,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Compute one split of one tile of in features, or of dP.

    Programs: (tile of in features, split of the tokens). G is 0 without dP. `sum_ptr` receives the sums over the
    splits; with a single split it equals `splits_ptr`. EVEN_T and EVEN_N say that tiles need no bounds check.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    tokens = split.to(tl.int64) * T_PER_SPLIT + tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(0) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    n_mask = (columns < n)[None, :] | EVEN_N
    split_stride = split_stride.to(tl.int64)
    n_tiles = tl.cdiv(n, BLOCK_N)
    if tl.program_id(0) >= n_tiles:  # this program has no in features and computes dP
        if NEEDS_DW:
            splits_ptr += (Z + L) * n
            sum_ptr += (Z + L) * n
        out_ptr = splits_ptr + split * split_stride
        for g in range(G):
            if g % (tl.num_programs(0) - n_tiles) == tl.program_id(0) - n_tiles:
                _subspace_grad(gated_dh_ptr + g * gated_dh_group_stride, z_ptr + g * z_group_stride,
                               out_ptr + g * H * D, tokens, T, gated_dh_stride, z_stride,
                               T_PER_SPLIT, EVEN_T, H, D, PAD_H, PAD_D, ACC, BLOCK_T, PTX)  # fmt: skip
        if MAX_SPLITS > 1:  # noqa: SIM102 (Triton evaluates both operands of `and`, and counting has an effect)
            if _is_last_split(counter_ptr + tl.program_id(0), splits):
                subspace = tl.arange(0, PAD_D)
                for g in range(G):
                    if g % (tl.num_programs(0) - n_tiles) == tl.program_id(0) - n_tiles:
                        offset = g * H * D
                        _sum_splits(splits_ptr + offset, sum_ptr + offset, subspace, (subspace < D)[None, :], D,
                                    split_stride, splits, H, MAX_SPLITS)  # fmt: skip
        return
    head_rows = tl.arange(0, PAD_HEAD)
    tail_rows = PAD_HEAD + tl.arange(0, PAD_TAIL)
    router_rows = Z + tl.arange(0, PAD_L)
    offsets = tokens[:, None] * n + columns[None, :]
    d_out_ptr += tokens[:, None] * d_out_stride
    bits_ptr += tokens[:, None] * W + words[None, :]
    x_ptr += tokens[:, None] * x_stride + columns[None, :]
    dx_base_ptr += tokens[:, None] * dx_base_stride + columns[None, :]
    dx_ptr += offsets
    w_ptr += columns[None, :]
    if NEEDS_DX:
        w_head = tl.load(w_ptr + head_rows[:, None] * n, mask=(head_rows < Z)[:, None] & n_mask, other=0.0)
        if TAIL > 0:
            w_tail = tl.load(w_ptr + tail_rows[:, None] * n, mask=(tail_rows < Z)[:, None] & n_mask, other=0.0)
        if L > 0:
            w_router = tl.load(w_ptr + router_rows[:, None] * n, mask=(router_rows < Z + L)[:, None] & n_mask,
                               other=0.0)  # fmt: skip
    # The weight gradients are accumulated as their transpose: on Hopper the left operand of a matmul spans at least 64
    # rows, the right one only 16 columns, and Z and L are the smaller sides.
    dw_head = tl.zeros([BLOCK_N, PAD_HEAD], dtype=ACC)
    dw_tail = tl.zeros([BLOCK_N, PAD_TAIL], dtype=ACC)
    dw_router = tl.zeros([BLOCK_N, PAD_L], dtype=ACC)
    for start in range(0, T_PER_SPLIT, BLOCK_T):
        t_mask = (tokens + start < T)[:, None] | EVEN_T
        word = tl.load(bits_ptr, mask=t_mask & ((words < W)[None, :] | EVEN_N), other=0)
        d_head = tl.load(d_out_ptr + head_rows[None, :], mask=t_mask & (head_rows < Z)[None, :], other=0.0)
        if TAIL > 0:
            d_tail = tl.load(d_out_ptr + tail_rows[None, :], mask=t_mask & (tail_rows < Z)[None, :], other=0.0)
        if L > 0:
            d_logits = tl.load(d_out_ptr + router_rows[None, :], mask=t_mask & (router_rows < Z + L)[None, :],
                               other=0.0)  # fmt: skip
        if NEEDS_DW:
            x = tl.load(x_ptr, mask=t_mask & n_mask, other=0.0)
        if NEEDS_DX:
            dx = tl.dot(d_head, w_head, input_precision="ieee", out_dtype=ACC)
            if TAIL > 0:
                dx = tl.dot(d_tail, w_tail, dx, input_precision="ieee", out_dtype=ACC)
            dx = mask_tile(dx * SCALE, word, BLOCK_T, BLOCK_N, PTX)
            if L > 0:
                dx = tl.dot(d_logits, w_router, dx, input_precision="ieee", out_dtype=ACC)
            if HAS_DX_BASE:
                dx += tl.load(dx_base_ptr, mask=t_mask & n_mask)
            tl.store(dx_ptr, dx, mask=t_mask & n_mask)
        if NEEDS_DW:
            masked = tl.trans(mask_tile(x, word, BLOCK_T, BLOCK_N, PTX))
            dw_head = tl.dot(masked, d_head, dw_head, input_precision="ieee", out_dtype=ACC)
            if TAIL > 0:
                dw_tail = tl.dot(masked, d_tail, dw_tail, input_precision="ieee", out_dtype=ACC)
            if L > 0:
                dw_router = tl.dot(tl.trans(x), d_logits, dw_router, input_precision="ieee", out_dtype=ACC)
                dw_router = wait_for_dot(dw_router, PTX)
            if TAIL > 0:
                dw_tail = wait_for_dot(dw_tail, PTX)
            dw_head = wait_for_dot(dw_head, PTX)
        d_out_ptr += BLOCK_T * d_out_stride
        bits_ptr += BLOCK_T * W
        x_ptr += BLOCK_T * x_stride
        dx_base_ptr += BLOCK_T * dx_base_stride
        dx_ptr += BLOCK_T * n
    if NEEDS_DW:
        out_ptr = splits_ptr + split * split_stride + columns[None, :]
        tl.store(out_ptr + head_rows[:, None] * n, tl.trans(dw_head) * SCALE, mask=(head_rows < Z)[:, None] & n_mask)
        if TAIL > 0:
            tl.store(out_ptr + tail_rows[:, None] * n, tl.trans(dw_tail) * SCALE,
                     mask=(tail_rows < Z)[:, None] & n_mask)  # fmt: skip
        if L > 0:
            tl.store(out_ptr + router_rows[:, None] * n, tl.trans(dw_router),
                     mask=(router_rows < Z + L)[:, None] & n_mask)  # fmt: skip
        if MAX_SPLITS > 1:  # noqa: SIM102 (Triton evaluates both operands of `and`, and counting has an effect)
            if _is_last_split(counter_ptr + tl.program_id(0), splits):
                _sum_splits(splits_ptr, sum_ptr, columns, n_mask, n, split_stride, splits, Z + L, MAX_SPLITS)


class SubspaceGrad(NamedTuple):
    """Operands of the gradient of P, for all projections of a group: dP = gated_dhᵀ z.

    Attributes:
        gated_dh: [G, T, ≥H], from `gate.gate_backward`.
        z: [G, T, ≥D], the output of the down projections.
        H: Rows of dP, the total rank of a projection's experts.
        D: Columns of dP.
    """

    gated_dh: Tensor
    z: Tensor
    H: int
    D: int

    @property
    def is_small(self) -> bool:
        """True if the accumulators of one projection fit into one program's registers."""
        return tile_size(self.H) * tile_size(self.D) <= MAX_SUBSPACE_ELEMENTS

    def matmul_tn_fp32(self) -> Tensor:
        """Return dP [G, H, D] by torch's matmul, in float32 or wider."""
        return matmul_tn_fp32(self.gated_dh, self.z)[:, : self.H, : self.D]


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dweights, dP


def down_proj_backward(
    d_down_out: Tensor,
    x: Tensor,
    bits: Tensor | None,
    weights: Tensor,
    Z: int,
    p: float,
    dx_base: Tensor | None = None,
    needs_dx: bool = True,
    needs_dweights: bool = True,
    subspace: SubspaceGrad | None = None,
    counters: Tensor | None = None,
) -> Grads:
    """Return the gradients of `down_forward.dropout_matmul`, and of P.

    Args:
        d_down_out: [T, Z + L], with any row stride: the gradients of the down projections' outputs and of the logits.
        x: [T, n], with any row stride.
        bits: [T, ⌈n/32⌉] int32, the mask of the forward pass; None if nothing was dropped.
        weights: [Z + L, n], contiguous: the rows of Wd above those of Wr.
        Z: Rows of Wd.
        p: Dropout probability.
        dx_base: [T, n] or None, with any row stride. It is added to dx.
        needs_dx: Whether to compute dx.
        needs_dweights: Whether to compute dweights.
        subspace: Operands of dP, or None for no dP.
        counters: From `split_k_counters`, zero, and used by no other call at the same time. They are zero again
            afterwards. None allocates them.

    Returns:
        dx: [T, n] in the dtype of x: dropout(dz Wd) + dlogits Wr + dx_base.
        dweights: [Z + L, n] in float32 or wider: dzᵀ dropout(x) above dlogitsᵀ x.
        dP: [G, H, D] in float32 or wider.

        Each is None if it was not asked for.
    """
    if not (needs_dx or needs_dweights or subspace):
        return None, None, None
    if bits is None or prefers_plain_matmul(x, Z, len(weights) - Z):
        dx, dweights = _backward_by_torch(d_down_out, x, bits, weights, Z, p, dx_base, needs_dx, needs_dweights)
        return dx, dweights, subspace and subspace.matmul_tn_fp32()
    return _backward_by_kernel(
        d_down_out, x, bits, weights, Z, p, dx_base, needs_dx, needs_dweights, subspace, counters
    )


def _backward_by_torch(
    d_down_out: Tensor,
    x: Tensor,
    bits: Tensor | None,
    weights: Tensor,
    Z: int,
    p: float,
    dx_base: Tensor | None,
    needs_dx: bool,
    needs_dweights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx and dweights by torch's matmuls, with dropout in a pass of its own."""
    dx = dweights = None
    if bits is None:
        if needs_dx:
            dx = d_down_out @ weights if dx_base is None else torch.addmm(dx_base, d_down_out, weights)
        return dx, matmul_tn_fp32(d_down_out, x) if needs_dweights else None
    dz, dlogits = d_down_out[:, :Z], d_down_out[:, Z:]
    if needs_dx:
        dx = apply_dropout(dz @ weights[:Z], bits, p)
        dx = (dx if dx_base is None else dx.add_(dx_base)).addmm_(dlogits, weights[Z:])
    if needs_dweights:
        dweights = torch.cat([matmul_tn_fp32(dz, apply_dropout(x, bits, p)), matmul_tn_fp32(dlogits, x)])
    return dx, dweights


def _backward_by_kernel(
    d_down_out: Tensor,
    x: Tensor,
    bits: Tensor,
    weights: Tensor,
    Z: int,
    p: float,
    dx_base: Tensor | None,
    needs_dx: bool,
    needs_dweights: bool,
    subspace: SubspaceGrad | None,
    counters: Tensor | None,
) -> Grads:
    """Launch the kernel, and torch's matmul for a large dP.

    A dP that does not fit into registers is left to torch's matmul.
    """
    (T, n), rows, tiles = x.shape, len(weights), down_tiling.BACKWARD
    fused = subspace if subspace is not None and subspace.is_small else None
    # Without dP the kernel reads neither operand; it only needs pointers and strides.
    gated_dh, z, H, D = fused or SubspaceGrad(d_down_out[None], d_down_out[None], 1, 1)
    G = len(gated_dh) if fused else 0
    sizes = [rows * n * needs_dweights, G * H * D]
    t_per_split = _tokens_per_split(x, Z, rows - Z)
    splits = cdiv(T, t_per_split)
    partial_sums = x.new_empty(splits, sum(sizes), dtype=torch.promote_types(x.dtype, torch.float32))
    total = partial_sums.new_empty(sum(sizes)) if splits > 1 else partial_sums[0]
    if counters is None and splits > 1:
        counters = split_k_counters(x)
    dx = x.new_empty(T, n) if needs_dx else None
    grid = cdiv(n, tiles.block_n) + min(MAX_SUBSPACE_PROGRAMS, G), splits
    launch(
        _down_proj_backward_kernel, grid,
        d_down_out, x, bits, weights, x if dx_base is None else dx_base, x if dx is None else dx, partial_sums, total,
        counters, gated_dh, z, T, n, bits.shape[1], d_down_out.stride(0), x.stride(0),
        0 if dx_base is None else dx_base.stride(0), gated_dh.stride(1), gated_dh.stride(0), z.stride(1), z.stride(0),
        sum(sizes), G=G, H=H, D=D, PAD_H=tile_size(H), PAD_D=tile_size(D, MIN_RIGHT_COLUMNS),
        MAX_SPLITS=next_power_of_2(splits), T_PER_SPLIT=t_per_split, NEEDS_DX=needs_dx, NEEDS_DW=needs_dweights,
        HAS_DX_BASE=dx_base is not None, EVEN_T=T % t_per_split == 0, EVEN_N=n % tiles.block_n == 0,
        **tile_constants(weights, Z, p), **tiles.options(Z, rows - Z, x.device),
    )  # fmt: skip
    dweights, dP = total.split(sizes)
    return (
        dx,
        dweights.view(rows, n) if needs_dweights else None,
        dP.view(-1, H, D) if fused else subspace and subspace.matmul_tn_fp32(),
    )


def _tokens_per_split(x: Tensor, Z: int, L: int) -> int:
    """Return the tokens per split, a power-of-two number of tiles.

    So few different kernels are compiled.
    """
    tiles = down_tiling.BACKWARD
    t_tiles, n_tiles = cdiv(x.shape[0], tiles.block_t), cdiv(x.shape[1], tiles.block_n)
    fixed, per_stage = tiles.shared_bytes(Z, L)
    needed = fixed + tiles.stages(Z, L, x.device) * per_stage
    two_fit = 2 * needed <= tiling.shared_memory_bytes(x.device)  # two programs at once on a multiprocessor
    target = down_tiling.TARGET_PROGRAMS if two_fit else down_tiling.TARGET_PROGRAMS // 2
    per_split = cdiv(t_tiles, split_count(n_tiles, t_tiles, target))
    return next_power_of_2(per_split) * tiles.block_t


def split_k_counters(x: Tensor) -> Tensor:
    """Return zeroed counters for `down_proj_backward`.

    They serve inputs with the feature count of x [T, n]. The programs of a launch count in them which split finishes
    last.
    """
    tiles = cdiv(x.shape[1], down_tiling.BACKWARD.block_n)
    return x.new_zeros(tiles + MAX_SUBSPACE_PROGRAMS, dtype=torch.int32)
