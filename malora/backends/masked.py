"""Products of the down sides with dropout inside: the input is read once, and what dropout leaves is never written.

A mask is a bit an element, drawn once and kept for the backward pass. Routers see all inputs, so their rows of a
product are computed from the same tile before it is masked.

Shapes: T tokens, n in, Z rows of down sides, L rows of routers, W = ⌈n/32⌉ words of mask. Sums are in float32, or
float64 where the data is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

OF = 65536  # a mask's probability is a multiple of 1/65536


@triton.jit
def _mask_kernel(bits_ptr, seed_ptr, size, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    # A bit that is 1 with probability q becomes one of (q + 1)/2 by OR with a fair bit and of q/2 by AND: sixteen fair
    # words, taken by the digits of KEPT from the last on, make KEPT/65536. Seven rounds of Philox pass the usual tests
    # of randomness (Salmon et al. 2011).
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for draw in tl.static_range(4):
        words = tl.randint4x(seed, place * 4 + draw, n_rounds=7)
        for word in tl.static_range(4):
            fair = words[word].to(tl.int32, bitcast=True)
            if (KEPT >> (4 * draw + word)) & 1:
                bits = bits | fair
            else:
                bits = bits & fair
    tl.store(bits_ptr + place, bits, mask=place < size)


def mask(T: int, n: int, seed: Tensor, p: float) -> Tensor:
    """[T, W] int32: bit j of word w is 0 where dropout takes column 32·w + j, by a seed [1] of int64."""
    bits = torch.empty(T, triton.cdiv(n, 32), dtype=torch.int32, device=seed.device)
    _mask_kernel[(triton.cdiv(bits.numel(), 256),)](bits, seed, bits.numel(), KEPT=_kept(p), BLOCK=256)
    return bits


def _kept(p: float) -> int:
    return min(max(OF - round(p * OF), 1), OF - 1)


@triton.jit
def _is_kept(bits_ptr, rows, columns, W, inside):
    word = tl.load(bits_ptr + rows.to(tl.int64)[:, None] * W + (columns // 32)[None, :], mask=inside, other=0)
    return ((word >> (columns % 32)[None, :]) & 1) != 0


@triton.jit
def _down_kernel(
    x_ptr, bits_ptr, down_ptr, zl_ptr, T, n: tl.constexpr, W, zl_stride,
    SCALE: tl.constexpr, Z: tl.constexpr, L: tl.constexpr,
    PAD_Z: tl.constexpr, PAD_L: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_inside = (rows < T)[:, None]
    z_rows = tl.arange(0, PAD_Z)
    l_rows = tl.arange(0, PAD_L)
    z = tl.zeros([BLOCK_T, PAD_Z], dtype=WIDE)
    logits = tl.zeros([BLOCK_T, PAD_L], dtype=WIDE)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = row_inside & (columns < n)[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :], mask=inside, other=0.0)
        d = tl.load(down_ptr + z_rows[None, :] * n + columns[:, None],
                    mask=(z_rows < Z)[None, :] & (columns < n)[:, None], other=0.0)  # fmt: skip
        kept = tl.where(_is_kept(bits_ptr, rows, columns, W, inside), x, 0.0).to(x.dtype)
        z = tl.dot(kept, d, z, input_precision="ieee", out_dtype=WIDE)
        if L > 0:
            g = tl.load(down_ptr + (Z + l_rows)[None, :] * n + columns[:, None],
                        mask=(l_rows < L)[None, :] & (columns < n)[:, None], other=0.0)  # fmt: skip
            logits = tl.dot(x, g, logits, input_precision="ieee", out_dtype=WIDE)
    place = zl_ptr + rows.to(tl.int64)[:, None] * zl_stride
    tl.store(place + z_rows[None, :], z * SCALE, mask=row_inside & (z_rows < Z)[None, :])
    if L > 0:
        tl.store(place + Z + l_rows[None, :], logits, mask=row_inside & (l_rows < L)[None, :])


@triton.jit
def _input_gradient_kernel(
    dzl_ptr, bits_ptr, down_ptr, dx_ptr, T, n, W, zl_stride, SCALE: tl.constexpr, Z: tl.constexpr, L: tl.constexpr,
    PAD_L: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = (rows < T)[:, None]
    column_inside = (columns < n)[None, :]
    dzl_ptr += rows.to(tl.int64)[:, None] * zl_stride
    dx = tl.zeros([BLOCK_T, BLOCK_N], dtype=WIDE)
    for start in range(0, Z, BLOCK_Z):
        z_rows = start + tl.arange(0, BLOCK_Z)
        dz = tl.load(dzl_ptr + z_rows[None, :], mask=row_inside & (z_rows < Z)[None, :], other=0.0)
        d = tl.load(down_ptr + z_rows[:, None] * n + columns[None, :],
                    mask=(z_rows < Z)[:, None] & column_inside, other=0.0)  # fmt: skip
        dx = tl.dot(dz, d, dx, input_precision="ieee", out_dtype=WIDE)
    inside = row_inside & column_inside
    dx = tl.where(_is_kept(bits_ptr, rows, columns, W, inside), dx * SCALE, 0.0)
    if L > 0:
        l_rows = tl.arange(0, PAD_L)
        dl = tl.load(dzl_ptr + Z + l_rows[None, :], mask=row_inside & (l_rows < L)[None, :], other=0.0)
        g = tl.load(down_ptr + (Z + l_rows)[:, None] * n + columns[None, :],
                    mask=(l_rows < L)[:, None] & column_inside, other=0.0)  # fmt: skip
        dx = tl.dot(dl, g, dx, input_precision="ieee", out_dtype=WIDE)
    tl.store(dx_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :], dx, mask=inside)


@triton.jit
def _weight_gradient_kernel(
    dzl_ptr, x_ptr, bits_ptr, out_ptr, T, n, W, zl_stride, T_EACH: tl.constexpr,
    SCALE: tl.constexpr, Z: tl.constexpr, L: tl.constexpr, PAD_Z: tl.constexpr, PAD_L: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    column_inside = (columns < n)[None, :]
    z_rows = tl.arange(0, PAD_Z)
    l_rows = tl.arange(0, PAD_L)
    z_sum = tl.zeros([PAD_Z, BLOCK_N], dtype=WIDE)
    l_sum = tl.zeros([PAD_L, BLOCK_N], dtype=WIDE)
    for start in range(0, T_EACH, BLOCK_T):
        rows = part * T_EACH + start + tl.arange(0, BLOCK_T)
        inside = (rows < T)[:, None] & column_inside
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :], mask=inside, other=0.0)
        kept = tl.where(_is_kept(bits_ptr, rows, columns, W, inside), x, 0.0).to(x.dtype)
        place = dzl_ptr + rows.to(tl.int64)[None, :] * zl_stride
        dz = tl.load(place + z_rows[:, None], mask=(rows < T)[None, :] & (z_rows < Z)[:, None], other=0.0)
        z_sum = tl.dot(dz, kept, z_sum, input_precision="ieee", out_dtype=WIDE)
        if L > 0:
            dl = tl.load(place + Z + l_rows[:, None], mask=(rows < T)[None, :] & (l_rows < L)[:, None], other=0.0)
            l_sum = tl.dot(dl, x, l_sum, input_precision="ieee", out_dtype=WIDE)
    out_ptr += part.to(tl.int64) * (Z + L) * n
    tl.store(out_ptr + z_rows[:, None] * n + columns[None, :], z_sum * SCALE,
             mask=(z_rows < Z)[:, None] & column_inside)  # fmt: skip
    if L > 0:
        tl.store(out_ptr + (Z + l_rows)[:, None] * n + columns[None, :], l_sum,
                 mask=(l_rows < L)[:, None] & column_inside)  # fmt: skip


DOWN = {"BLOCK_T": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4}
INPUT_GRADIENT = {"BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_Z": 32, "num_warps": 4, "num_stages": 2}
WEIGHT_GRADIENT = {"BLOCK_T": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
PROGRAMS = 264  # two for each multiprocessor of an H100


def down(x: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float) -> Tensor:
    """[dropout(x) Dᵀ, x Gᵀ]: [T, Z + L] of x [T, n]; weights are the Z rows of D above the L of G."""
    zl = x.new_empty(len(x), len(weights))
    _down_kernel[(triton.cdiv(len(x), DOWN["BLOCK_T"]),)](
        x, bits, weights, zl, *x.shape, bits.shape[1], zl.stride(0), **_sizes(weights, Z, p), PAD_Z=_pad(Z), **DOWN
    )
    return zl


def input_gradient(dzl: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float) -> Tensor:
    """dropout(dz D) + dl G: [T, n] of dzl [T, Z + L]."""
    T, n = len(dzl), weights.shape[1]
    dx = dzl.new_empty(T, n)
    grid = (triton.cdiv(T, INPUT_GRADIENT["BLOCK_T"]), triton.cdiv(n, INPUT_GRADIENT["BLOCK_N"]))
    _input_gradient_kernel[grid](
        dzl, bits, weights, dx, T, n, bits.shape[1], dzl.stride(0), **_sizes(weights, Z, p), **INPUT_GRADIENT
    )
    return dx


def weight_gradient(dzl: Tensor, x: Tensor, bits: Tensor, Z: int, p: float) -> Tensor:
    """[dzᵀ dropout(x); dlᵀ x]: [Z + L, n] in float32 or wider, of dzl [T, Z + L]."""
    (T, n), rows = x.shape, dzl.shape[1]
    blocks = triton.cdiv(n, WEIGHT_GRADIENT["BLOCK_N"])
    # Where there are few columns the tokens are shared out; the parts are added up in a fixed order.
    T_each = triton.next_power_of_2(max(triton.cdiv(T * blocks, PROGRAMS), WEIGHT_GRADIENT["BLOCK_T"]))
    parts = triton.cdiv(T, T_each)
    out = torch.empty(parts, rows, n, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    _weight_gradient_kernel[(blocks, parts)](
        dzl, x, bits, out, T, n, bits.shape[1], dzl.stride(0), T_each,
        **_sizes(dzl.T, Z, p), PAD_Z=_pad(Z), **WEIGHT_GRADIENT,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def _sizes(weights: Tensor, Z: int, p: float) -> dict[str, Any]:
    L = len(weights) - Z
    wide = tl.float64 if weights.dtype == torch.float64 else tl.float32
    return {"SCALE": OF / _kept(p), "Z": Z, "L": L, "PAD_L": _pad(L), "WIDE": wide}


def _pad(size: int) -> int:
    return max(16, triton.next_power_of_2(size))  # tl.dot takes no less
