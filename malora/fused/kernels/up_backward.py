"""The gradients of up sides, dh = dy Bᵀ and dB = hᵀ dy, by one kernel for all siblings.

Each product alone is a pass over dy at the speed of memory. Programs of both kinds run beside each other over the same
part of dy, and what one has loaded the other finds in the cache.

Shapes: T tokens, G siblings, m out, H total rank of a sibling's experts.
"""

from __future__ import annotations

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels import tiling
from malora.fused.kernels.tiling import MIN_RIGHT_COLUMNS, accumulator_dtype, split_tile

TUNED = {"BLOCK": 64, "BLOCK_SUM": 128, "num_stages": 4, "num_warps": 4}  # the fastest tried on an H100
MAX_RANK = 128  # of more, the sums of a block do not stay in registers


def is_profitable(dy: Tensor, h: Tensor, H: int) -> bool:
    """Whether for a sibling one kernel is faster than two products.

    With few ranks, elements of 16 bits, rows that begin at multiples of 16 of them, which are copied ahead, and shared
    memory for two stages of such copies.
    """
    is_narrow = not dy.is_cuda or dy.element_size() == 2
    is_aligned = not (dy.stride(0) % 16 or h.stride(-2) % 16 or any(t.data_ptr() % 16 for t in (dy, h)))
    return is_narrow and is_aligned and H <= MAX_RANK and dy.numel() > 0 and _stages(H, dy.device) >= 2


def _stages(H: int, device: torch.device) -> int:
    """Stages of loads that shared memory has room for, at most those of TUNED.

    In bytes, for elements of two, as Triton 3.6 lays them out for Hopper.
    """
    ranks = split_tile(H, MIN_RIGHT_COLUMNS)
    rows = TUNED["BLOCK"] + ranks["first"] + (ranks["pad_rest"] if ranks["rest"] else 0)
    return min(TUNED["num_stages"], tiling.shared_memory_bytes(device) // (2 * rows * TUNED["BLOCK_SUM"]))


@triton.jit
def _of_h(
    dy_ptr, b_ptr, dh_ptr, block, T, m, dh_stride, M_UP: tl.constexpr, ALPHA: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_M: tl.constexpr, H: tl.constexpr, REST: tl.constexpr, PAD_H: tl.constexpr, PAD_REST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    rows = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_SUM)
    ranks, rest_ranks = tl.arange(0, PAD_H), PAD_H + tl.arange(0, PAD_REST)
    row_inside = (rows < T)[:, None] | EVEN_T
    dy_ptr += rows[:, None] * m + columns[None, :]
    b_ptr += columns[None, :]
    total = tl.zeros([BLOCK, PAD_H], dtype=WIDE)
    rest = tl.zeros([BLOCK, PAD_REST], dtype=WIDE)
    for start in range(0, M_UP, BLOCK_SUM):
        column_inside = (columns + start < m)[None, :] | EVEN_M
        dy = tl.load(dy_ptr, mask=row_inside & column_inside, other=0.0)
        b = tl.load(b_ptr + ranks[:, None] * m, mask=(ranks < H)[:, None] & column_inside, other=0.0)
        total = tl.dot(dy, tl.trans(b), total, input_precision="ieee", out_dtype=WIDE)
        if REST > 0:
            b = tl.load(b_ptr + rest_ranks[:, None] * m, mask=(rest_ranks < H)[:, None] & column_inside, other=0.0)
            rest = tl.dot(dy, tl.trans(b), rest, input_precision="ieee", out_dtype=WIDE)
        dy_ptr += BLOCK_SUM
        b_ptr += BLOCK_SUM
    dh_ptr += rows[:, None] * dh_stride
    tl.store(dh_ptr + ranks[None, :], total * ALPHA, mask=row_inside & (ranks < H)[None, :])
    if REST > 0:
        tl.store(dh_ptr + rest_ranks[None, :], rest * ALPHA, mask=row_inside & (rest_ranks < H)[None, :])


@triton.jit
def _of_B(
    dy_ptr, h_ptr, db_ptr, block, T, m, h_stride, T_UP: tl.constexpr, ALPHA: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_M: tl.constexpr, H: tl.constexpr, REST: tl.constexpr, PAD_H: tl.constexpr, PAD_REST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_SUM).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    ranks, rest_ranks = tl.arange(0, PAD_H), PAD_H + tl.arange(0, PAD_REST)
    column_inside = (columns < m)[None, :] | EVEN_M
    dy_ptr += rows[:, None] * m + columns[None, :]
    h_ptr += rows[:, None] * h_stride
    total = tl.zeros([BLOCK, PAD_H], dtype=WIDE)
    rest = tl.zeros([BLOCK, PAD_REST], dtype=WIDE)
    for start in range(0, T_UP, BLOCK_SUM):
        row_inside = (rows + start < T)[:, None] | EVEN_T
        dy = tl.load(dy_ptr, mask=row_inside & column_inside, other=0.0)
        h = tl.load(h_ptr + ranks[None, :], mask=row_inside & (ranks < H)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy), h, total, input_precision="ieee", out_dtype=WIDE)
        if REST > 0:
            h = tl.load(h_ptr + rest_ranks[None, :], mask=row_inside & (rest_ranks < H)[None, :], other=0.0)
            rest = tl.dot(tl.trans(dy), h, rest, input_precision="ieee", out_dtype=WIDE)
        dy_ptr += BLOCK_SUM * m
        h_ptr += BLOCK_SUM * h_stride
    db_ptr += columns[None, :]
    tl.store(db_ptr + ranks[:, None] * m, tl.trans(total) * ALPHA, mask=(ranks < H)[:, None] & column_inside)
    if REST > 0:
        tl.store(
            db_ptr + rest_ranks[:, None] * m, tl.trans(rest) * ALPHA, mask=(rest_ranks < H)[:, None] & column_inside
        )


@triton.jit
def _up_kernel(
    dy_ptrs, h_ptrs, b_ptrs, dh_ptrs, db_ptr, T, m, h_stride, dh_stride, T_UP: tl.constexpr, M_UP: tl.constexpr,
    ALPHA: tl.constexpr, EVEN_T: tl.constexpr, EVEN_M: tl.constexpr, H: tl.constexpr, REST: tl.constexpr,
    PAD_H: tl.constexpr, PAD_REST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    of_h, of_b = tl.cdiv(T, BLOCK), tl.cdiv(m, BLOCK)
    group, program = tl.program_id(0) // (of_h + of_b), tl.program_id(0) % (of_h + of_b)
    dy_ptr, h_ptr, b_ptr, dh_ptr = dy_ptrs[0], h_ptrs[0], b_ptrs[0], dh_ptrs[0]
    for other in tl.static_range(1, len(dy_ptrs)):
        dy_ptr = tl.where(group == other, dy_ptrs[other], dy_ptr)
        h_ptr = tl.where(group == other, h_ptrs[other], h_ptr)
        b_ptr = tl.where(group == other, b_ptrs[other], b_ptr)
        dh_ptr = tl.where(group == other, dh_ptrs[other], dh_ptr)
    # A sibling's two kinds take turns while there are both; then come what is left of the larger.
    both = 2 * min(of_h, of_b)
    is_of_h = tl.where(program < both, program % 2 == 0, of_h > of_b)
    block = tl.where(program < both, program // 2, program - both // 2)
    if is_of_h:
        _of_h(dy_ptr, b_ptr, dh_ptr, block, T, m, dh_stride, M_UP, ALPHA, EVEN_T, EVEN_M, H, REST, PAD_H, PAD_REST,
              WIDE, BLOCK, BLOCK_SUM)  # fmt: skip
    else:
        db_ptr += group.to(tl.int64) * H * m
        _of_B(dy_ptr, h_ptr, db_ptr, block, T, m, h_stride, T_UP, ALPHA, EVEN_T, EVEN_M, H, REST, PAD_H, PAD_REST,
              WIDE, BLOCK, BLOCK_SUM)  # fmt: skip


def up_proj_backward(dys: list[Tensor], h: Tensor, Bs: list[Tensor], alpha: float, dh: Tensor) -> list[Tensor]:
    """Writes alpha · dy Bᵀ of each sibling into dh [G, T, H]; returns alpha · hᵀ dy, [H, m] in float32 or wider.

    Args:
        dys: each [T, m], contiguous.
        h: [G, T, H], in rows anywhere, as are those of dh. `pays` says of which.
        Bs: each [H, m], contiguous.
    """
    found: list[Tensor] = []
    for _, alike in groupby(dys, key=lambda dy: dy.shape[1]):  # neighbours of one width are one launch
        chosen = slice(len(found), len(found) + len(list(alike)))
        found += _of_one_width(dys[chosen], h[chosen], Bs[chosen], alpha, dh[chosen])
    return found


def _of_one_width(dys: list[Tensor], h: Tensor, Bs: list[Tensor], alpha: float, dh: Tensor) -> tuple[Tensor, ...]:
    (T, m), G, H = dys[0].shape, len(dys), len(Bs[0])
    dBs = torch.empty(G, H, m, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    ranks, block, block_sum = split_tile(H, MIN_RIGHT_COLUMNS), TUNED["BLOCK"], TUNED["BLOCK_SUM"]
    T_up, M_up = _up(T, block_sum), triton.cdiv(m, block_sum) * block_sum
    _up_kernel[(G * (triton.cdiv(T, block) + triton.cdiv(m, block)),)](
        tuple(dys), tuple(h), tuple(Bs), tuple(dh), dBs, T, m, h.stride(1), dh.stride(1), T_up, M_up, ALPHA=alpha,
        EVEN_T=(T_up == T), EVEN_M=(m == M_up), H=H, PAD_H=ranks["first"], REST=ranks["rest"],
        PAD_REST=ranks["pad_rest"], WIDE=accumulator_dtype(h.dtype), **TUNED | {"num_stages": _stages(H, h.device)},
    )  # fmt: skip
    return dBs.unbind()


def _up(size: int, block: int) -> int:
    """A number of tokens as whole blocks, up to an eighth more: few different ones mean few compilations."""
    blocks = triton.cdiv(size, block)
    step = 1 << max(0, blocks.bit_length() - 4)
    return triton.cdiv(blocks, step) * step * block
