"""Fused dropout and down projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels import down_tiling
from malora.fused.kernels.down_tiling import aligned_rows, constants_of, fitting, prefers_plain_matmul, split_count
from malora.fused.kernels.dropout import apply_dropout, mask_tile
from malora.fused.kernels.tiling import wait_for_dot


@triton.jit
def _down_kernel(
    x_ptr, bits_ptr, down_ptr, zl_ptr, copy_ptr, T, n, W, x_stride, zl_stride, copy_stride, N_EACH: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_N: tl.constexpr, COPIES: tl.constexpr, SCALE: tl.constexpr, Z: tl.constexpr,
    REST: tl.constexpr, L: tl.constexpr, PAD_Z: tl.constexpr, PAD_REST: tl.constexpr, PAD_L: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    columns = part * N_EACH + tl.arange(0, BLOCK_N)
    words = part * (N_EACH // 32) + tl.arange(0, BLOCK_N // 32)
    row_inside = (rows < T)[:, None] | EVEN_T
    z_rows = tl.arange(0, PAD_Z)
    rest_rows = PAD_Z + tl.arange(0, PAD_REST)
    l_rows = Z + tl.arange(0, PAD_L)
    x_ptr += rows[:, None] * x_stride + columns[None, :]
    copy_ptr += rows[:, None] * copy_stride + columns[None, :]
    bits_ptr += rows[:, None] * W + words[None, :]
    down_ptr += columns[None, :]
    z = tl.zeros([BLOCK_T, PAD_Z], dtype=WIDE)
    rest = tl.zeros([BLOCK_T, PAD_REST], dtype=WIDE)
    logits = tl.zeros([BLOCK_T, PAD_L], dtype=WIDE)
    for start in range(0, N_EACH, BLOCK_N):
        column_inside = (columns + start < n)[None, :] | EVEN_N
        x = tl.load(x_ptr, mask=row_inside & column_inside, other=0.0)
        word = tl.load(bits_ptr, mask=row_inside & ((words + start // 32 < W)[None, :] | EVEN_N), other=0)
        d = tl.load(down_ptr + z_rows[:, None] * n, mask=(z_rows < Z)[:, None] & column_inside, other=0.0)
        if COPIES:
            tl.store(copy_ptr, x, mask=row_inside & column_inside)
            copy_ptr += BLOCK_N
        left = mask_tile(x, word, BLOCK_T, BLOCK_N, PTX)
        z = tl.dot(left, tl.trans(d), z, input_precision="ieee", out_dtype=WIDE)
        if REST > 0:
            d = tl.load(down_ptr + rest_rows[:, None] * n, mask=(rest_rows < Z)[:, None] & column_inside, other=0.0)
            rest = tl.dot(left, tl.trans(d), rest, input_precision="ieee", out_dtype=WIDE)
        if L > 0:
            g = tl.load(down_ptr + l_rows[:, None] * n, mask=(l_rows < Z + L)[:, None] & column_inside, other=0.0)
            logits = wait_for_dot(tl.dot(x, tl.trans(g), logits, input_precision="ieee", out_dtype=WIDE), PTX)
        if REST > 0:
            rest = wait_for_dot(rest, PTX)
        z = wait_for_dot(z, PTX)
        x_ptr += BLOCK_N
        bits_ptr += BLOCK_N // 32
        down_ptr += BLOCK_N
    place = zl_ptr + (part.to(tl.int64) * T + rows)[:, None] * zl_stride
    tl.store(place + z_rows[None, :], z * SCALE, mask=row_inside & (z_rows < Z)[None, :])
    if REST > 0:
        tl.store(place + rest_rows[None, :], rest * SCALE, mask=row_inside & (rest_rows < Z)[None, :])
    if L > 0:
        tl.store(place + l_rows[None, :], logits, mask=row_inside & (l_rows < Z + L)[None, :])


def dropout_matmul(
    x: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float, copy: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """[dropout(x) Dᵀ, x Gᵀ]: [T, Z + L] of x [T, n]; weights are the Z rows of D above the L of G.

    Where there is a `copy` [T, n], x is written into it: it is read anyway. Its rows and those of `out` lie anywhere.
    """
    zl, parts = dropout_matmul_split_k(x, bits, weights, Z, p, copy)
    if out is None:
        return zl if parts is None else zl.copy_(parts.sum(0))
    return out.copy_(zl if parts is None else parts.sum(0))


def dropout_matmul_split_k(
    x: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float, copy: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What `down` gives and None; or room for that, unwritten, and what it is the sum of.

    The latter is [parts, T, Z + L] in float32 or wider. Rows are as far apart in both.
    """
    (T, n), columns = x.shape, len(weights)
    zl = aligned_rows(x, columns)
    if prefers_plain_matmul(x, Z, columns - Z):
        torch.mm(apply_dropout(x, bits, p), weights[:Z].T, out=zl[:, :Z])
        torch.mm(x, weights[Z:].T, out=zl[:, Z:])
        if copy is not None:
            copy.copy_(x)
        return zl, None
    blocks, blocks_n = triton.cdiv(T, down_tiling.DOWN["BLOCK_T"]), triton.cdiv(n, down_tiling.DOWN["BLOCK_N"])
    n_each = (
        triton.cdiv(blocks_n, split_count(blocks, blocks_n // down_tiling.MIN_BLOCKS_PER_SPLIT))
        * down_tiling.DOWN["BLOCK_N"]
    )
    count, parts = triton.cdiv(n, n_each), None
    if count > 1:
        parts = x.new_empty(count, T, zl.stride(0), dtype=torch.promote_types(x.dtype, torch.float32))[..., :columns]
    _down_kernel[(blocks, count)](
        x, bits, weights, zl if parts is None else parts, x if copy is None else copy, T, n, bits.shape[1],
        x.stride(0), zl.stride(0), 0 if copy is None else copy.stride(0), n_each,
        EVEN_T=T % down_tiling.DOWN["BLOCK_T"] == 0,
        EVEN_N=n % n_each == 0, COPIES=copy is not None, **constants_of(weights, Z, p),
        **fitting(down_tiling.DOWN, Z, columns - Z, x.device),
    )  # fmt: skip
    return zl, parts
