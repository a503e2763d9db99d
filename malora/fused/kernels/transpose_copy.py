"""Scaled transposes of up projections in the padding of augmented weights.

    augmented_weight = [W, padding, α Bᵀ]

An augmented weight computes x Wᵀ + α h B as one matmul over [x h] (see `augmented_weights.py`). The frozen W is written
once; α Bᵀ changes with each optimizer step.

1. A program loads a tile of B [BLOCK_H, BLOCK_M]: rows of B are contiguous in the out features.
2. It transposes and scales the tile in registers and stores it into the last H columns of the augmented weight.
3. The third axis of the launch is the projection, so that one launch serves a group.

| symbol | meaning | size |
| --- | --- | --- |
| m | out features of a projection | |
| H | total rank of a projection's experts | |
| B | up projection | [H, m] |
| padding | last columns of the augmented weight | [m, H] |
| α | scaling, 1 where the gate has applied it | |

`Tensor.copy_` of a transpose takes one launch per projection, and either its loads or its stores are uncoalesced.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels.launch import launch
from malora.fused.tensor_utils import cdiv


def write_up_proj(augmented_weights: list[Tensor], Bs: list[Tensor], alpha: float) -> None:
    """Write alpha · Bᵀ into the last H columns of each augmented weight.

    Args:
        augmented_weights: One [m, ≥H] per projection, with any row stride. The other columns keep their values.
        Bs: One [H, m] per projection, contiguous.
        alpha: Scaling. The product with it is rounded to the weights' dtype.
    """
    H, max_m = len(Bs[0]), max(B.shape[1] for B in Bs)
    launch(
        _write_up_proj_kernel, (cdiv(max_m, 128), cdiv(H, 32), len(Bs)),
        tuple(Bs), tuple(weight[:, -H:] for weight in augmented_weights), H, tuple(B.shape[1] for B in Bs),
        tuple(weight.stride(0) for weight in augmented_weights), SCALE=alpha, BLOCK_H=32, BLOCK_M=128,
    )  # fmt: skip


@triton.jit
def _write_one_up_proj(
    B_ptr, padding_ptr, H, m, padding_stride, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write a tile of one projection.

    `padding_stride` is the row stride of the augmented weight.
    """
    columns = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask, m_mask = ranks < H, columns < m
    B = tl.load(B_ptr + ranks[:, None] * m + columns[None, :], mask=h_mask[:, None] & m_mask[None, :])
    place = padding_ptr + columns[:, None] * padding_stride + ranks[None, :]
    tl.store(place, tl.trans(B) * SCALE, mask=m_mask[:, None] & h_mask[None, :])


@triton.jit
def _write_up_proj_kernel(
    B_ptrs, padding_ptrs, H, ms, padding_strides, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write a tile of one projection.

    Programs: (tile of out features, tile of ranks, projection). Tuples have one entry per projection.
    """
    for g in tl.static_range(len(ms)):
        if tl.program_id(2) == g:
            _write_one_up_proj(B_ptrs[g], padding_ptrs[g], H, ms[g], padding_strides[g], SCALE, BLOCK_H, BLOCK_M)
