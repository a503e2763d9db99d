"""Dropout with a bit mask that is drawn once and read by several matmuls.

    dropout(x) = x ⊙ keep / (1 - p)

1. `draw_mask` draws one bit per element of x: 1 keeps it, 0 drops it. 32 bits are packed into one int32 word.
2. The down-projection kernels load a tile of x with its words and apply them by `mask_tile` in registers. So the
   dropped-out input is never written to memory, and the backward pass needs no second draw.
3. `apply_dropout` is the unfused version, for shapes that the kernels do not take.

| symbol | meaning | size |
| --- | --- | --- |
| T | tokens | |
| n | in features | |
| W | mask words per token | ⌈n/32⌉ |
| x | input | [T, n] |
| bits | mask; bit j of word w belongs to column 32·w + j | [T, W] int32 |
| p | probability that an element is dropped | |

`torch.nn.functional.dropout` writes the dropped-out input, which the matmul then reads again, and a mask of one byte
per element. Here the mask is an eighth of that, and the dropped-out input is not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels.launch import launch
from malora.fused.tensor_utils import cdiv

LEVELS = 4096  # 2¹²: the keep probability is a multiple of 1/4096, since the kernel combines twelve fair bits


@triton.jit
def _draw_mask_kernel(bits_ptr, seed_ptr, size, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Draw BLOCK words of independent bits, each 1 with probability KEEP/4096.

    OR with a fair bit turns a bit of probability q into one of (q + 1)/2; AND turns it into one of q/2. Twelve fair
    bits, combined by the binary digits of KEEP from the lowest on, give KEEP/4096. Philox needs seven rounds to pass
    the usual tests of randomness (Salmon et al. 2011).
    """
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for draw in tl.static_range(3):
        words = tl.randint4x(seed, offsets * 3 + draw, n_rounds=7)
        for word in tl.static_range(4):
            fair = words[word].to(tl.int32, bitcast=True)
            if (KEEP >> (4 * draw + word)) & 1:
                bits = bits | fair
            else:
                bits = bits & fair
    tl.store(bits_ptr + offsets, bits, mask=offsets < size)


def draw_mask(T: int, n: int, seed: Tensor, p: float) -> Tensor:
    """Draw the dropout mask of an input [T, n].

    Args:
        T: Tokens.
        n: In features.
        seed: [1] int64, on the device where the mask is wanted. A CUDA graph reads its value in each replay.
        p: Probability that an element is dropped, rounded to a multiple of 1/4096.

    Returns:
        [T, ⌈n/32⌉] int32. Bit j of word w is 0 if column 32·w + j is dropped.
    """
    bits = torch.empty(T, cdiv(n, 32), dtype=torch.int32, device=seed.device)
    grid = (cdiv(bits.numel(), 256),)
    launch(_draw_mask_kernel, grid, bits, seed, bits.numel(), KEEP=_keep_level(p), BLOCK=256)
    return bits


def rescale(p: float) -> float:
    """Return the factor of the elements that are kept.

    It is one over the keep probability as it is drawn.
    """
    return LEVELS / _keep_level(p)


def _keep_level(p: float) -> int:
    """Return the keep probability in units of 1/LEVELS, never 0 and never 1."""
    return min(max(LEVELS - round(p * LEVELS), 1), LEVELS - 1)


@triton.jit
def _unpack_bits(word, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Unpack words [BLOCK_T, BLOCK_N / 32] to booleans [BLOCK_T, BLOCK_N].

    True keeps an element.
    """
    return tl.reshape((word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, [BLOCK_T, BLOCK_N]) != 0


@triton.jit
def mask_tile(x, word, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """Set the dropped elements of a tile x [BLOCK_T, BLOCK_N] to zero.

    The others are not rescaled. `word` holds the tile's mask words [BLOCK_T, BLOCK_N / 32]. With PTX, elements of x
    must have 16 or 32 bits.
    """
    if PTX:
        # One comparison per element would be half of all instructions of a matmul's loop. Instead:
        # 1. Shift each word so that an element's bit is the sign bit of a byte. Four elements share one shift.
        # 2. `prmt` in its sign mode (selector 8 + byte) replicates that sign bit over the element: 0 or all ones.
        # 3. AND with the element. Two elements of 16 bits, adjacent in a register, are handled at once.
        bit = tl.arange(0, 32)
        signs = tl.reshape(word[:, :, None] << (7 - bit % 8)[None, None, :], [BLOCK_T, BLOCK_N])
        byte = tl.broadcast_to((bit // 8)[None, None, :] * 0x1111, [BLOCK_T, BLOCK_N // 32, 32])
        byte = tl.reshape(byte, [BLOCK_T, BLOCK_N])
        if x.dtype.primitive_bitwidth == 32:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 keep; prmt.b32 keep, $2, $2, $3; and.b32 $0, $1, keep; }", "=r,r,r,r",
                [x, signs, 0x8888 + byte], dtype=x.dtype, is_pure=True, pack=1,
            )  # fmt: skip
        # Both elements of a pair lie in the same byte of the word, so the first one's selector serves both. This
        # assumes that Triton packs adjacent elements into a register; the test against masked tensors on a GPU would
        # fail if it did not.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 keep; prmt.b32 keep, $2, $3, $4; and.b32 $0, $1, keep; }", "=r,r,r,r,r,r",
            [x, signs, 0xCC88 + byte], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.where(_unpack_bits(word, BLOCK_T, BLOCK_N), x, 0.0).to(x.dtype)


@triton.jit
def _apply_dropout_kernel(
    x_ptr, bits_ptr, out_ptr, T, n, W, x_stride, SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t_mask = (tokens < T)[:, None]
    mask = t_mask & (columns < n)[None, :]
    x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=mask)
    words = tl.program_id(1) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    word = tl.load(bits_ptr + tokens.to(tl.int64)[:, None] * W + words[None, :],
                   mask=t_mask & (words < W)[None, :], other=0)  # fmt: skip
    keep = _unpack_bits(word, BLOCK_T, BLOCK_N)
    offsets = tokens.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_ptr + offsets, tl.where(keep, x * SCALE, 0.0), mask=mask)


def apply_dropout(x: Tensor, bits: Tensor, p: float) -> Tensor:
    """Return dropout(x), contiguous.

    Dropped elements are zero, the others are multiplied by `rescale(p)`.

    Args:
        x: [T, n], with any row stride.
        bits: [T, ⌈n/32⌉] int32, from `draw_mask` with the same p.
        p: Probability that an element is dropped.
    """
    out = x.new_empty(x.shape)
    grid = (cdiv(len(x), 32), cdiv(x.shape[1], 128))
    sizes = (*x.shape, bits.shape[1], x.stride(0))
    launch(_apply_dropout_kernel, grid, x, bits, out, *sizes, SCALE=rescale(p), BLOCK_T=32, BLOCK_N=128)
    return out
