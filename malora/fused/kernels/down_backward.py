"""Products of the down sides with dropout inside: the input is read once, and what dropout leaves is never written.

Routers see all inputs, so their rows of a product are computed from the same tile before it is masked.

Shapes: T tokens, n in, Z rows of down sides, L rows of routers, W = ⌈n/32⌉ words of mask. Sums are in float32, or
float64 where the data is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels import down_tiling, tiling
from malora.fused.kernels.down_tiling import (
    bytes_of,
    constants_of,
    fitting,
    matmul_tn_fp32,
    prefers_plain_matmul,
    split_count,
)
from malora.fused.kernels.dropout import apply_dropout, mask_tile
from malora.fused.kernels.tiling import MIN_RIGHT_COLUMNS, tile_size, wait_for_dot


@triton.jit
def _of_p(
    e_ptr, z_ptr, dp_ptr, rows, T, e_stride, z_stride, T_EACH: tl.constexpr, EVEN_T: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, PAD_H: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    ranks, columns = tl.arange(0, PAD_H), tl.arange(0, PAD_D)
    e_ptr += rows[:, None] * e_stride + ranks[None, :]
    z_ptr += rows[:, None] * z_stride + columns[None, :]
    total = tl.zeros([PAD_H, PAD_D], dtype=WIDE)
    for start in range(0, T_EACH, BLOCK_T):
        row_inside = (rows + start < T)[:, None] | EVEN_T
        e = tl.load(e_ptr, mask=row_inside & (ranks < H)[None, :], other=0.0)
        z = tl.load(z_ptr, mask=row_inside & (columns < D)[None, :], other=0.0)
        total = wait_for_dot(tl.dot(tl.trans(e), z, total, input_precision="ieee", out_dtype=WIDE), PTX)
        e_ptr += BLOCK_T * e_stride
        z_ptr += BLOCK_T * z_stride
    tl.store(dp_ptr + ranks[:, None] * D + columns[None, :], total, mask=(ranks < H)[:, None] & (columns < D)[None, :])


@triton.jit
def _is_last(count_ptr, parts):
    """Whether this program is the last of so many that end; the count is zero again then."""
    tl.debug_barrier()  # all that its threads have stored comes before its count
    is_last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == parts - 1
    if is_last:
        tl.store(count_ptr, 0)
    return is_last


@triton.jit
def _add_up(parts_ptr, total_ptr, columns, column_inside, row_stride, part_stride, parts, ROWS: tl.constexpr,
            MAX_SPLITS: tl.constexpr):  # fmt: skip
    """The sum of the parts of so many rows, in the order of the parts, which are loaded side by side."""
    for first in range(0, ROWS, 16):
        rows = first + tl.arange(0, 16)
        place = rows[:, None] * row_stride + columns[None, :]
        inside = (rows < ROWS)[:, None] & column_inside
        total = tl.load(parts_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")  # as others have left it
        for part in tl.static_range(1, MAX_SPLITS):
            there = (rows < tl.where(part < parts, ROWS, 0))[:, None] & column_inside
            total += tl.load(parts_ptr + part * part_stride + place, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(total_ptr + place, total, mask=inside)


@triton.jit
def _gradients_kernel(
    dzl_ptr, x_ptr, bits_ptr, down_ptr, base_ptr, dx_ptr, parts_ptr, total_ptr, count_ptr, e_ptr, z_ptr, T, n, W,
    zl_stride, x_stride, base_stride, e_stride, e_group, z_stride, z_group, part_stride, G: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, PAD_H: tl.constexpr, PAD_D: tl.constexpr, MAX_SPLITS: tl.constexpr,
    T_EACH: tl.constexpr, OF_INPUT: tl.constexpr, OF_WEIGHTS: tl.constexpr, ADDS: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_N: tl.constexpr, SCALE: tl.constexpr, Z: tl.constexpr, REST: tl.constexpr, L: tl.constexpr,
    PAD_Z: tl.constexpr, PAD_REST: tl.constexpr, PAD_L: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(1), tl.num_programs(1)
    rows = part.to(tl.int64) * T_EACH + tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(0) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    column_inside = (columns < n)[None, :] | EVEN_N
    part_stride = part_stride.to(tl.int64)
    blocks = tl.cdiv(n, BLOCK_N)
    if tl.program_id(0) >= blocks:  # has no columns, and makes gradients of P
        if OF_WEIGHTS:
            parts_ptr += (Z + L) * n
            total_ptr += (Z + L) * n
        out_ptr = parts_ptr + part * part_stride
        for g in range(G):
            if g % (tl.num_programs(0) - blocks) == tl.program_id(0) - blocks:
                _of_p(e_ptr + g * e_group, z_ptr + g * z_group, out_ptr + g * H * D, rows, T, e_stride, z_stride,
                      T_EACH, EVEN_T, H, D, PAD_H, PAD_D, WIDE, BLOCK_T, PTX)  # fmt: skip
        if MAX_SPLITS > 1:  # noqa: SIM102 (Triton would count before it knew of how many)
            if _is_last(count_ptr + tl.program_id(0), parts):
                subspace = tl.arange(0, PAD_D)
                for g in range(G):
                    if g % (tl.num_programs(0) - blocks) == tl.program_id(0) - blocks:
                        at = g * H * D
                        _add_up(parts_ptr + at, total_ptr + at, subspace, (subspace < D)[None, :], D, part_stride,
                                parts, H, MAX_SPLITS)  # fmt: skip
        return
    z_rows = tl.arange(0, PAD_Z)
    rest_rows = PAD_Z + tl.arange(0, PAD_REST)
    l_rows = Z + tl.arange(0, PAD_L)
    place = rows[:, None] * n + columns[None, :]
    dzl_ptr += rows[:, None] * zl_stride
    bits_ptr += rows[:, None] * W + words[None, :]
    x_ptr += rows[:, None] * x_stride + columns[None, :]
    base_ptr += rows[:, None] * base_stride + columns[None, :]
    dx_ptr += place
    down_ptr += columns[None, :]
    if OF_INPUT:
        d = tl.load(down_ptr + z_rows[:, None] * n, mask=(z_rows < Z)[:, None] & column_inside, other=0.0)
        if REST > 0:
            r = tl.load(down_ptr + rest_rows[:, None] * n, mask=(rest_rows < Z)[:, None] & column_inside, other=0.0)
        if L > 0:
            g = tl.load(down_ptr + l_rows[:, None] * n, mask=(l_rows < Z + L)[:, None] & column_inside, other=0.0)
    # Columns by rows, not rows by columns: of a product's left side a block is 64 on Hopper, of its right one 16 do.
    z_sum = tl.zeros([BLOCK_N, PAD_Z], dtype=WIDE)
    rest_sum = tl.zeros([BLOCK_N, PAD_REST], dtype=WIDE)
    l_sum = tl.zeros([BLOCK_N, PAD_L], dtype=WIDE)
    for start in range(0, T_EACH, BLOCK_T):
        row_inside = (rows + start < T)[:, None] | EVEN_T
        word = tl.load(bits_ptr, mask=row_inside & ((words < W)[None, :] | EVEN_N), other=0)
        dz = tl.load(dzl_ptr + z_rows[None, :], mask=row_inside & (z_rows < Z)[None, :], other=0.0)
        if REST > 0:
            drest = tl.load(dzl_ptr + rest_rows[None, :], mask=row_inside & (rest_rows < Z)[None, :], other=0.0)
        if L > 0:
            dl = tl.load(dzl_ptr + l_rows[None, :], mask=row_inside & (l_rows < Z + L)[None, :], other=0.0)
        if OF_WEIGHTS:
            x = tl.load(x_ptr, mask=row_inside & column_inside, other=0.0)
        if OF_INPUT:
            dx = tl.dot(dz, d, input_precision="ieee", out_dtype=WIDE)
            if REST > 0:
                dx = tl.dot(drest, r, dx, input_precision="ieee", out_dtype=WIDE)
            dx = mask_tile(dx * SCALE, word, BLOCK_T, BLOCK_N, PTX)
            if L > 0:
                dx = tl.dot(dl, g, dx, input_precision="ieee", out_dtype=WIDE)
            if ADDS:
                dx += tl.load(base_ptr, mask=row_inside & column_inside)
            tl.store(dx_ptr, dx, mask=row_inside & column_inside)
        if OF_WEIGHTS:
            left = tl.trans(mask_tile(x, word, BLOCK_T, BLOCK_N, PTX))
            z_sum = tl.dot(left, dz, z_sum, input_precision="ieee", out_dtype=WIDE)
            if REST > 0:
                rest_sum = tl.dot(left, drest, rest_sum, input_precision="ieee", out_dtype=WIDE)
            if L > 0:
                l_sum = tl.dot(tl.trans(x), dl, l_sum, input_precision="ieee", out_dtype=WIDE)
                l_sum = wait_for_dot(l_sum, PTX)
            if REST > 0:
                rest_sum = wait_for_dot(rest_sum, PTX)
            z_sum = wait_for_dot(z_sum, PTX)
        dzl_ptr += BLOCK_T * zl_stride
        bits_ptr += BLOCK_T * W
        x_ptr += BLOCK_T * x_stride
        base_ptr += BLOCK_T * base_stride
        dx_ptr += BLOCK_T * n
    if OF_WEIGHTS:
        out_ptr = parts_ptr + part * part_stride + columns[None, :]
        tl.store(out_ptr + z_rows[:, None] * n, tl.trans(z_sum) * SCALE, mask=(z_rows < Z)[:, None] & column_inside)
        if REST > 0:
            tl.store(out_ptr + rest_rows[:, None] * n, tl.trans(rest_sum) * SCALE,
                     mask=(rest_rows < Z)[:, None] & column_inside)  # fmt: skip
        if L > 0:
            tl.store(out_ptr + l_rows[:, None] * n, tl.trans(l_sum), mask=(l_rows < Z + L)[:, None] & column_inside)
        if MAX_SPLITS > 1:  # noqa: SIM102 (Triton would count before it knew of how many)
            if _is_last(count_ptr + tl.program_id(0), parts):
                _add_up(parts_ptr, total_ptr, columns, column_inside, n, part_stride, parts, Z + L, MAX_SPLITS)


MAX_SUBSPACE_PROGRAMS = 2  # programs
MAX_SUBSPACE_ELEMENTS = 128 * 64  # elements of a gradient of P that one program sums up


class SubspaceGrad(NamedTuple):
    """What the gradients of P are made of: dP [G, H, D] = eᵀ z, of e [G, T, ≥H] and z [G, T, ≥D]."""

    e: Tensor
    z: Tensor
    H: int
    D: int

    @property
    def is_small(self) -> bool:
        """Whether its sums stay in the registers of one program."""
        return tile_size(self.H) * tile_size(self.D) <= MAX_SUBSPACE_ELEMENTS

    def matmul_tn_fp32(self) -> Tensor:
        return matmul_tn_fp32(self.e, self.z)[:, : self.H, : self.D]


def down_proj_backward(
    dzl: Tensor, x: Tensor, bits: Tensor | None, weights: Tensor, Z: int, p: float, base: Tensor | None = None,
    of_input: bool = True, of_weights: bool = True, of_p: SubspaceGrad | None = None, counts: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dropout(dz D) + dl G + base, [T, n]; [dzᵀ dropout(x); dlᵀ x], [Z + L, n], and dP in float32 or wider; or None.

    Of dzl [T, Z + L], x [T, n], weights [Z + L, n] and, if there is one, `base` [T, n], in rows anywhere. Without bits
    nothing was dropped. `counts` are of `counts_for`, not in use elsewhere at the same time; if None, they are made.
    """
    dx = dweights = dP = None
    if not (of_input or of_weights or of_p):
        return dx, dweights, dP
    if bits is None:
        if of_input:
            dx = dzl @ weights if base is None else torch.addmm(base, dzl, weights)
        return dx, matmul_tn_fp32(dzl, x) if of_weights else None, of_p and of_p.matmul_tn_fp32()
    if prefers_plain_matmul(x, Z, len(weights) - Z):
        if of_input:
            dx = apply_dropout(dzl[:, :Z] @ weights[:Z], bits, p)
            dx = (dx if base is None else dx.add_(base)).addmm_(dzl[:, Z:], weights[Z:])
        if of_weights:
            dweights = torch.cat([matmul_tn_fp32(dzl[:, :Z], apply_dropout(x, bits, p)), matmul_tn_fp32(dzl[:, Z:], x)])
        return dx, dweights, of_p and of_p.matmul_tn_fp32()
    (T, n), rows = x.shape, len(weights)
    joins = of_p is not None and of_p.is_small
    e, z, H, D = of_p if joins else (dzl[None], dzl[None], 1, 1)
    sizes = [rows * n * of_weights, len(e) * H * D * joins]
    tuned = fitting(down_tiling.GRADIENTS, Z, rows - Z, x.device)
    blocks, blocks_T = (
        triton.cdiv(n, down_tiling.GRADIENTS["BLOCK_N"]),
        triton.cdiv(T, down_tiling.GRADIENTS["BLOCK_T"]),
    )
    fits_twice = 2 * bytes_of(down_tiling.GRADIENTS, Z, rows - Z, tuned["num_stages"]) <= tiling.shared_memory_bytes(
        x.device
    )
    each = triton.cdiv(
        blocks_T, split_count(blocks, blocks_T, down_tiling.PROGRAMS if fits_twice else down_tiling.PROGRAMS // 2)
    )
    T_each = (
        triton.next_power_of_2(each) * down_tiling.GRADIENTS["BLOCK_T"]
    )  # a power of two of blocks, for few compilations
    parts = triton.cdiv(T, T_each)
    if of_input:
        dx = x.new_empty(T, n)
    wide = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    sums = torch.empty(parts, sum(sizes), **wide)
    total = torch.empty(sum(sizes), **wide) if parts > 1 else sums[0]
    if counts is None and parts > 1:
        counts = split_k_counters(x)
    # Two for the gradients of P: one of three siblings would be the last to end.
    _gradients_kernel[blocks + min(MAX_SUBSPACE_PROGRAMS, len(e) * joins), parts](
        dzl, x, bits, weights, x if base is None else base, x if dx is None else dx, sums, total, counts, e, z, T, n,
        bits.shape[1], dzl.stride(0), x.stride(0), 0 if base is None else base.stride(0), e.stride(1), e.stride(0),
        z.stride(1), z.stride(0), sum(sizes), G=len(e) * joins, H=H, D=D, PAD_H=tile_size(H),
        PAD_D=tile_size(D, MIN_RIGHT_COLUMNS),
        MAX_SPLITS=triton.next_power_of_2(parts), T_EACH=T_each, OF_INPUT=of_input, OF_WEIGHTS=of_weights,
        ADDS=base is not None, EVEN_T=T % T_each == 0,
        EVEN_N=n % down_tiling.GRADIENTS["BLOCK_N"] == 0, **constants_of(weights, Z, p),
        **tuned,
    )  # fmt: skip
    of_rows, of_ranks = total.split(sizes)
    if of_weights:
        dweights = of_rows.view(rows, n)
    if of_p is not None:
        dP = of_ranks.view(-1, H, D) if joins else of_p.matmul_tn_fp32()
    return dx, dweights, dP


def split_k_counters(x: Tensor) -> Tensor:
    """Zeros, by which the programs of `gradients` know who of them adds up the parts of a sum; they are zero after it.

    Of x [T, n].
    """
    return x.new_zeros(
        triton.cdiv(x.shape[1], down_tiling.GRADIENTS["BLOCK_N"]) + MAX_SUBSPACE_PROGRAMS, dtype=torch.int32
    )
