"""Fused dropout, down projection and routing logits.

    [z, logits] = [dropout(x) Wdᵀ, x Wrᵀ]

The down-projection weights Wd of a group and its routers Wr are stacked into one weight matrix. The router reads x
without dropout, so both results need the same tile of x, once masked and once not.

1. A program takes a tile of tokens and loops over tiles of in features.
2. It loads a tile of x and its mask words, and applies the mask in registers (`dropout.mask_tile`).
3. It multiplies the masked tile by a tile of Wd, and the unmasked one by a tile of Wr. All Z + L accumulators stay in
   registers.
4. Few tokens give few programs. Then the in features are split as well (split-K), each split writes its own partial
   sum in float32, and the gate kernel adds them when it reads them.
5. On request the tile of x is also stored elsewhere: into a matrix that has padded columns for h behind x.

Z may lie far above a power of two. So its columns are covered by two tiles, a head and a tail (`tiling.split_tile`).

| symbol | meaning | size |
| --- | --- | --- |
| T, n | tokens, in features | |
| Z | rows of the stacked down projections Wd | |
| L | rows of the stacked routers Wr, 0 without routers | |
| W | mask words per token | ⌈n/32⌉ |
| x | input | [T, n] |
| bits | dropout mask, see `dropout.py` | [T, W] int32 |
| weights (w) | Wd above Wr | [Z + L, n] |
| down_out (out) | columns z, logits | [T, Z + L] |
| splits | partial sums of down_out | [splits, T, Z + L] float32 |
| copy | where x is copied to | [T, n] |
| head, tail | first and second tile of the Z columns | PAD_HEAD, PAD_TAIL |

Accumulators are float32, or float64 for float64 data. cuBLAS would need the dropped-out input in memory, and a second
matmul over x for the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels import down_tiling
from malora.fused.kernels.down_tiling import aligned_rows, prefers_plain_matmul, split_count, tile_constants
from malora.fused.kernels.dropout import apply_dropout, mask_tile
from malora.fused.kernels.launch import launch
from malora.fused.kernels.tiling import wait_for_dot
from malora.fused.tensor_utils import cdiv


@triton.jit
def _dropout_matmul_kernel(
    x_ptr, bits_ptr, w_ptr, out_ptr, copy_ptr, T, n, W, x_stride, out_stride, copy_stride,
    N_PER_SPLIT: tl.constexpr, EVEN_T: tl.constexpr, EVEN_N: tl.constexpr, WRITE_COPY: tl.constexpr,
    SCALE: tl.constexpr, Z: tl.constexpr, TAIL: tl.constexpr, L: tl.constexpr, PAD_HEAD: tl.constexpr,
    PAD_TAIL: tl.constexpr, PAD_L: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Compute a tile of tokens of one split.

    Programs: (tile of tokens, split of the in features). `out_ptr` is down_out [T, Z + L], or the splits
    [splits, T, Z + L]. EVEN_T and EVEN_N say that tiles need no bounds check. PAD_HEAD, PAD_TAIL and PAD_L are the tile
    sides that cover the head of Z, its tail, and L.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    columns = split * N_PER_SPLIT + tl.arange(0, BLOCK_N)
    words = split * (N_PER_SPLIT // 32) + tl.arange(0, BLOCK_N // 32)
    t_mask = (tokens < T)[:, None] | EVEN_T
    head_rows = tl.arange(0, PAD_HEAD)
    tail_rows = PAD_HEAD + tl.arange(0, PAD_TAIL)
    router_rows = Z + tl.arange(0, PAD_L)
    x_ptr += tokens[:, None] * x_stride + columns[None, :]
    copy_ptr += tokens[:, None] * copy_stride + columns[None, :]
    bits_ptr += tokens[:, None] * W + words[None, :]
    w_ptr += columns[None, :]
    head = tl.zeros([BLOCK_T, PAD_HEAD], dtype=ACC)
    tail = tl.zeros([BLOCK_T, PAD_TAIL], dtype=ACC)
    logits = tl.zeros([BLOCK_T, PAD_L], dtype=ACC)
    for start in range(0, N_PER_SPLIT, BLOCK_N):
        n_mask = (columns + start < n)[None, :] | EVEN_N
        x = tl.load(x_ptr, mask=t_mask & n_mask, other=0.0)
        word = tl.load(bits_ptr, mask=t_mask & ((words + start // 32 < W)[None, :] | EVEN_N), other=0)
        w = tl.load(w_ptr + head_rows[:, None] * n, mask=(head_rows < Z)[:, None] & n_mask, other=0.0)
        if WRITE_COPY:
            tl.store(copy_ptr, x, mask=t_mask & n_mask)
            copy_ptr += BLOCK_N
        masked = mask_tile(x, word, BLOCK_T, BLOCK_N, PTX)
        head = tl.dot(masked, tl.trans(w), head, input_precision="ieee", out_dtype=ACC)
        if TAIL > 0:
            w = tl.load(w_ptr + tail_rows[:, None] * n, mask=(tail_rows < Z)[:, None] & n_mask, other=0.0)
            tail = tl.dot(masked, tl.trans(w), tail, input_precision="ieee", out_dtype=ACC)
        if L > 0:
            w = tl.load(w_ptr + router_rows[:, None] * n, mask=(router_rows < Z + L)[:, None] & n_mask, other=0.0)
            logits = wait_for_dot(tl.dot(x, tl.trans(w), logits, input_precision="ieee", out_dtype=ACC), PTX)
        if TAIL > 0:
            tail = wait_for_dot(tail, PTX)
        head = wait_for_dot(head, PTX)
        x_ptr += BLOCK_N
        bits_ptr += BLOCK_N // 32
        w_ptr += BLOCK_N
    out_ptr += (split.to(tl.int64) * T + tokens)[:, None] * out_stride
    tl.store(out_ptr + head_rows[None, :], head * SCALE, mask=t_mask & (head_rows < Z)[None, :])
    if TAIL > 0:
        tl.store(out_ptr + tail_rows[None, :], tail * SCALE, mask=t_mask & (tail_rows < Z)[None, :])
    if L > 0:
        tl.store(out_ptr + router_rows[None, :], logits, mask=t_mask & (router_rows < Z + L)[None, :])


def dropout_matmul(
    x: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float, copy: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return [dropout(x) Wdᵀ, x Wrᵀ].

    These are the down projections and the routing logits of a group.

    Args:
        x: [T, n], with any row stride.
        bits: [T, ⌈n/32⌉] int32, from `dropout.draw_mask` with the same p.
        weights: [Z + L, n], contiguous: the rows of Wd above those of Wr.
        Z: Rows of Wd.
        p: Dropout probability.
        copy: [T, n] or None, with any row stride. x is copied into it while it is read.
        out: [T, Z + L] or None, with any row stride. The result is written into it.

    Returns:
        [T, Z + L] in the dtype of x: `out` if given, else a new tensor whose row stride is a multiple of 16.
    """
    down_out, splits = dropout_matmul_split_k(x, bits, weights, Z, p, copy)
    if out is None:
        return down_out if splits is None else down_out.copy_(splits.sum(0))
    return out.copy_(down_out if splits is None else splits.sum(0))


def dropout_matmul_split_k(
    x: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float, copy: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute `dropout_matmul`, but leave the sum over split-K splits to the caller.

    `gate.gate` adds the splits while it reads them, which saves a pass over memory.

    Args:
        x: [T, n], with any row stride.
        bits: [T, ⌈n/32⌉] int32, from `dropout.draw_mask` with the same p.
        weights: [Z + L, n], contiguous: the rows of Wd above those of Wr.
        Z: Rows of Wd.
        p: Dropout probability.
        copy: [T, n] or None, with any row stride. x is copied into it while it is read.

    Returns:
        down_out: [T, Z + L] in the dtype of x. It holds the result if splits is None, else it is uninitialized memory
            for the result.
        splits: [splits, T, Z + L] in float32 or wider, with the row stride of down_out; their sum is the result. None
            if there is a single split.
    """
    (T, n), rows, tiles = x.shape, len(weights), down_tiling.FORWARD
    down_out = aligned_rows(x, rows)
    if prefers_plain_matmul(x, Z, rows - Z):
        torch.mm(apply_dropout(x, bits, p), weights[:Z].T, out=down_out[:, :Z])
        torch.mm(x, weights[Z:].T, out=down_out[:, Z:])
        if copy is not None:
            copy.copy_(x)
        return down_out, None
    t_tiles, n_tiles = cdiv(T, tiles.block_t), cdiv(n, tiles.block_n)
    wanted = split_count(t_tiles, n_tiles // down_tiling.MIN_BLOCKS_PER_SPLIT)
    n_per_split = cdiv(n_tiles, wanted) * tiles.block_n
    count, splits = cdiv(n, n_per_split), None
    if count > 1:
        dtype = torch.promote_types(x.dtype, torch.float32)
        splits = x.new_empty(count, T, down_out.stride(0), dtype=dtype)[..., :rows]
    launch(
        _dropout_matmul_kernel, (t_tiles, count),
        x, bits, weights, down_out if splits is None else splits, x if copy is None else copy, T, n, bits.shape[1],
        x.stride(0), down_out.stride(0), 0 if copy is None else copy.stride(0), n_per_split,
        EVEN_T=T % tiles.block_t == 0, EVEN_N=n % n_per_split == 0, WRITE_COPY=copy is not None,
        **tile_constants(weights, Z, p), **tiles.options(Z, rows - Z, x.device),
    )  # fmt: skip
    return down_out, splits
