"""Write scaled transposes into the padded columns of frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    pass


def write_up_proj(wholes: list[Tensor], Bs: list[Tensor], alpha: float) -> None:
    """Writes alpha · Bᵀ of B [H, m] into the room of each weight."""
    H, most = len(Bs[0]), max(B.shape[1] for B in Bs)
    _write_up_proj_kernel[triton.cdiv(most, 128), triton.cdiv(H, 32), len(Bs)](
        tuple(Bs), tuple(whole[:, -H:] for whole in wholes), H, tuple(B.shape[1] for B in Bs),
        tuple(whole.stride(0) for whole in wholes), SCALE=alpha, BLOCK_H=32, BLOCK_M=128,
    )  # fmt: skip


@triton.jit
def _write_one_up_proj(
    B_ptr, room_ptr, H, m, room_stride, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr
):
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    rank_inside, output_inside = ranks < H, outputs < m
    B = tl.load(B_ptr + ranks[:, None] * m + outputs[None, :], mask=rank_inside[:, None] & output_inside[None, :])
    place = room_ptr + outputs[:, None] * room_stride + ranks[None, :]
    tl.store(place, tl.trans(B) * SCALE, mask=output_inside[:, None] & rank_inside[None, :])


@triton.jit
def _write_up_proj_kernel(
    B_ptrs, room_ptrs, H, ms, room_strides, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr
):
    for g in tl.static_range(len(ms)):
        if tl.program_id(2) == g:
            _write_one_up_proj(B_ptrs[g], room_ptrs[g], H, ms[g], room_strides[g], SCALE, BLOCK_H, BLOCK_M)
