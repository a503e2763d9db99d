"""Dropout whose mask is a bit an element, drawn once: products read it where a mask of numbers would be as large as x.

Shapes: T tokens, n inputs, W = ⌈n/32⌉ words of mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LEVELS = 4096  # a mask's probability is a multiple of 1/4096


@triton.jit
def _mask_kernel(bits_ptr, seed_ptr, size, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    # A bit that is 1 with probability q becomes one of (q + 1)/2 by OR with a fair bit and of q/2 by AND: twelve fair
    # words, taken by the digits of KEPT from the last on, make KEPT/4096. Seven rounds of Philox pass the usual tests
    # of randomness (Salmon et al. 2011).
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for draw in tl.static_range(3):
        words = tl.randint4x(seed, place * 3 + draw, n_rounds=7)
        for word in tl.static_range(4):
            fair = words[word].to(tl.int32, bitcast=True)
            if (KEPT >> (4 * draw + word)) & 1:
                bits = bits | fair
            else:
                bits = bits & fair
    tl.store(bits_ptr + place, bits, mask=place < size)


def draw_mask(T: int, n: int, seed: Tensor, p: float) -> Tensor:
    """[T, W] int32: bit j of word w is 0 where dropout takes column 32·w + j, by a seed [1] of int64."""
    bits = torch.empty(T, triton.cdiv(n, 32), dtype=torch.int32, device=seed.device)
    _mask_kernel[(triton.cdiv(bits.numel(), 256),)](bits, seed, bits.numel(), KEPT=_kept(p), BLOCK=256)
    return bits


def rescale(p: float) -> float:
    """What is left is multiplied by, so that its expectation is what it was."""
    return LEVELS / _kept(p)


def _kept(p: float) -> int:
    """Of LEVELS elements, how many are left on average."""
    return min(max(LEVELS - round(p * LEVELS), 1), LEVELS - 1)


@triton.jit
def _kept_of(word, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_T, BLOCK_N]: which elements of a tile dropout leaves, of a word for every 32 columns."""
    return tl.reshape((word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, [BLOCK_T, BLOCK_N]) != 0


@triton.jit
def mask_tile(x, word, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """A tile x [BLOCK_T, BLOCK_N], of 16 or 32 bits an element where PTX, with zeros where dropout takes one."""
    if PTX:
        # A shift brings the bits of four elements to the fronts of the word's bytes; prmt spreads a front over its
        # element, or two that are of one byte, as neighbours in a row or a column are, over the pair. A comparison an
        # element was half of all instructions of a loop.
        bit = tl.arange(0, 32)
        fronts = tl.reshape(word[:, :, None] << (7 - bit % 8)[None, None, :], [BLOCK_T, BLOCK_N])
        byte = tl.broadcast_to((bit // 8)[None, None, :] * 0x1111, [BLOCK_T, BLOCK_N // 32, 32])
        byte = tl.reshape(byte, [BLOCK_T, BLOCK_N])
        if x.dtype.primitive_bitwidth == 32:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 kept; prmt.b32 kept, $2, $2, $3; and.b32 $0, $1, kept; }", "=r,r,r,r",
                [x, fronts, 0x8888 + byte], dtype=x.dtype, is_pure=True, pack=1,
            )  # fmt: skip
        # The selector of a pair's first element is that of both: Triton puts neighbours side by side in a register. A
        # GPU's test of products against masked tensors would see it if it did not.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 kept; prmt.b32 kept, $2, $3, $4; and.b32 $0, $1, kept; }", "=r,r,r,r,r,r",
            [x, fronts, 0xCC88 + byte], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.where(_kept_of(word, BLOCK_T, BLOCK_N), x, 0.0).to(x.dtype)


@triton.jit
def _dropout_kernel(
    x_ptr, bits_ptr, out_ptr, T, n, W, x_stride, SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = (rows < T)[:, None]
    inside = row_inside & (columns < n)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=inside)
    words = tl.program_id(1) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    word = tl.load(bits_ptr + rows.to(tl.int64)[:, None] * W + words[None, :],
                   mask=row_inside & (words < W)[None, :], other=0)  # fmt: skip
    kept = _kept_of(word, BLOCK_T, BLOCK_N)
    place = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_ptr + place, tl.where(kept, x * SCALE, 0.0), mask=inside)


def apply_dropout(x: Tensor, bits: Tensor, p: float) -> Tensor:
    """x [T, n] with elements dropped and the rest scaled up."""
    out = x.new_empty(x.shape)
    grid = (triton.cdiv(len(x), 32), triton.cdiv(x.shape[1], 128))
    sizes = (*x.shape, bits.shape[1], x.stride(0))
    _dropout_kernel[grid](x, bits, out, *sizes, SCALE=rescale(p), BLOCK_T=32, BLOCK_N=128)
    return out
