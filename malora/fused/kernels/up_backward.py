"""Backward pass of the up projections.

Both gradients are computed in one launch for all projections of a group.

    dh = α dy Bᵀ        dB = α hᵀ dy

H is small, so each of the two matmuls is bound by the time to read dy, the largest tensor of the backward pass.

1. Half of the programs compute dh: a tile of tokens, looping over tiles of out features.
2. The other half compute dB: a tile of out features, looping over tiles of tokens.
3. Programs of both kinds alternate in launch order. So they run at the same time over the same region of dy, and what
   one has loaded the other finds in the L2 cache.
4. H columns of the result stay in registers, in a head tile and a tail tile (`tiling.split_tile`).

| symbol | meaning | size |
| --- | --- | --- |
| T, m | tokens, out features | |
| G | projections in the launch, all with the same m | |
| H | total rank of a projection's experts | |
| dy | gradient of a projection's output | [T, m] |
| h | gated output of the experts | [G, T, H] |
| B | up projection of a projection's experts | [H, m] |
| dh | gradient of h | [G, T, H] |
| dB | gradient of B | [G, H, m] float32 |
| α | scaling, 1 where the gate has applied it | |
| head, tail | first and second tile of the H columns | PAD_HEAD, PAD_TAIL |
| BLOCK | tokens, or out features, per program | |
| BLOCK_SUM | terms of the sum per step of the loop | |

Accumulators are float32, or float64 for float64 data. Two cuBLAS calls per projection would read dy from
memory twice.
"""

from __future__ import annotations

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels import tiling
from malora.fused.kernels.launch import launch
from malora.fused.kernels.tiling import MIN_RIGHT_COLUMNS, accumulator_dtype, split_tile
from malora.fused.tensor_utils import cdiv

LAUNCH = {"BLOCK": 64, "BLOCK_SUM": 128, "num_stages": 4, "num_warps": 4}  # the fastest tried on an H100
MAX_RANK = 128  # beyond it the accumulators do not stay in registers
ALIGNMENT = 16  # of addresses in bytes and of row strides in elements: otherwise loads are not prefetched


def is_profitable(dy: Tensor, h: Tensor, H: int) -> bool:
    """Return whether the kernel is faster than two matmuls for a projection.

    It is for at most MAX_RANK ranks, 16-bit elements, aligned rows, and shared memory for at least two stages of
    prefetched tiles.

    Args:
        dy: [T, m].
        h: [T, H].
        H: Total rank of the projection's experts.
    """
    is_16_bit = not dy.is_cuda or dy.element_size() == 2
    strides_aligned = dy.stride(0) % ALIGNMENT == 0 and h.stride(-2) % ALIGNMENT == 0
    is_aligned = strides_aligned and all(t.data_ptr() % ALIGNMENT == 0 for t in (dy, h))
    return is_16_bit and is_aligned and H <= MAX_RANK and dy.numel() > 0 and _stages(H, dy.device) >= 2


def _stages(H: int, device: torch.device) -> int:
    """Return the number of stages of prefetched tiles that fit into shared memory.

    It is at most those of LAUNCH. Counted for 16-bit elements, as Triton 3.6 allocates them for Hopper.
    """
    rows = LAUNCH["BLOCK"] + split_tile(H, MIN_RIGHT_COLUMNS).padded
    return tiling.fitting_stages(2 * rows * LAUNCH["BLOCK_SUM"], device, max_stages=LAUNCH["num_stages"])


@triton.jit
def _dh_tile(
    dy_ptr, b_ptr, dh_ptr, block, T, m, dh_stride, M_PADDED: tl.constexpr, ALPHA: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_M: tl.constexpr, H: tl.constexpr, TAIL: tl.constexpr, PAD_HEAD: tl.constexpr, PAD_TAIL: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Compute dh of the tokens of tile `block`, summed over all out features."""
    tokens = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_SUM)
    head_ranks, tail_ranks = tl.arange(0, PAD_HEAD), PAD_HEAD + tl.arange(0, PAD_TAIL)
    t_mask = (tokens < T)[:, None] | EVEN_T
    dy_ptr += tokens[:, None] * m + columns[None, :]
    b_ptr += columns[None, :]
    head = tl.zeros([BLOCK, PAD_HEAD], dtype=ACC)
    tail = tl.zeros([BLOCK, PAD_TAIL], dtype=ACC)
    for start in range(0, M_PADDED, BLOCK_SUM):
        m_mask = (columns + start < m)[None, :] | EVEN_M
        dy = tl.load(dy_ptr, mask=t_mask & m_mask, other=0.0)
        b = tl.load(b_ptr + head_ranks[:, None] * m, mask=(head_ranks < H)[:, None] & m_mask, other=0.0)
        head = tl.dot(dy, tl.trans(b), head, input_precision="ieee", out_dtype=ACC)
        if TAIL > 0:
            b = tl.load(b_ptr + tail_ranks[:, None] * m, mask=(tail_ranks < H)[:, None] & m_mask, other=0.0)
            tail = tl.dot(dy, tl.trans(b), tail, input_precision="ieee", out_dtype=ACC)
        dy_ptr += BLOCK_SUM
        b_ptr += BLOCK_SUM
    dh_ptr += tokens[:, None] * dh_stride
    tl.store(dh_ptr + head_ranks[None, :], head * ALPHA, mask=t_mask & (head_ranks < H)[None, :])
    if TAIL > 0:
        tl.store(dh_ptr + tail_ranks[None, :], tail * ALPHA, mask=t_mask & (tail_ranks < H)[None, :])


@triton.jit
def _dB_tile(
    dy_ptr, h_ptr, db_ptr, block, T, m, h_stride, T_PADDED: tl.constexpr, ALPHA: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_M: tl.constexpr, H: tl.constexpr, TAIL: tl.constexpr, PAD_HEAD: tl.constexpr, PAD_TAIL: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Compute dB of the out features of tile `block`, summed over all tokens.

    It is accumulated as dBᵀ.
    """
    tokens = tl.arange(0, BLOCK_SUM).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    head_ranks, tail_ranks = tl.arange(0, PAD_HEAD), PAD_HEAD + tl.arange(0, PAD_TAIL)
    m_mask = (columns < m)[None, :] | EVEN_M
    dy_ptr += tokens[:, None] * m + columns[None, :]
    h_ptr += tokens[:, None] * h_stride
    head = tl.zeros([BLOCK, PAD_HEAD], dtype=ACC)
    tail = tl.zeros([BLOCK, PAD_TAIL], dtype=ACC)
    for start in range(0, T_PADDED, BLOCK_SUM):
        t_mask = (tokens + start < T)[:, None] | EVEN_T
        dy = tl.load(dy_ptr, mask=t_mask & m_mask, other=0.0)
        h = tl.load(h_ptr + head_ranks[None, :], mask=t_mask & (head_ranks < H)[None, :], other=0.0)
        head = tl.dot(tl.trans(dy), h, head, input_precision="ieee", out_dtype=ACC)
        if TAIL > 0:
            h = tl.load(h_ptr + tail_ranks[None, :], mask=t_mask & (tail_ranks < H)[None, :], other=0.0)
            tail = tl.dot(tl.trans(dy), h, tail, input_precision="ieee", out_dtype=ACC)
        dy_ptr += BLOCK_SUM * m
        h_ptr += BLOCK_SUM * h_stride
    db_ptr += columns[None, :]
    tl.store(db_ptr + head_ranks[:, None] * m, tl.trans(head) * ALPHA, mask=(head_ranks < H)[:, None] & m_mask)
    if TAIL > 0:
        tl.store(db_ptr + tail_ranks[:, None] * m, tl.trans(tail) * ALPHA, mask=(tail_ranks < H)[:, None] & m_mask)


@triton.jit
def _up_proj_backward_kernel(
    dy_ptrs, h_ptrs, b_ptrs, dh_ptrs, db_ptr, T, m, h_stride, dh_stride, T_PADDED: tl.constexpr,
    M_PADDED: tl.constexpr, ALPHA: tl.constexpr, EVEN_T: tl.constexpr, EVEN_M: tl.constexpr, H: tl.constexpr,
    TAIL: tl.constexpr, PAD_HEAD: tl.constexpr, PAD_TAIL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Compute one tile of dh or of dB of one projection.

    `*_ptrs` are tuples of one pointer per projection; `db_ptr` is that of dB [G, H, m]. T_PADDED and M_PADDED are T and
    m, rounded up to the lengths of the loops. EVEN_T and EVEN_M say that they equal T and m.
    """
    dh_tiles, db_tiles = tl.cdiv(T, BLOCK), tl.cdiv(m, BLOCK)
    group, program = tl.program_id(0) // (dh_tiles + db_tiles), tl.program_id(0) % (dh_tiles + db_tiles)
    dy_ptr, h_ptr, b_ptr, dh_ptr = dy_ptrs[0], h_ptrs[0], b_ptrs[0], dh_ptrs[0]
    for other in tl.static_range(1, len(dy_ptrs)):
        dy_ptr = tl.where(group == other, dy_ptrs[other], dy_ptr)
        h_ptr = tl.where(group == other, h_ptrs[other], h_ptr)
        b_ptr = tl.where(group == other, b_ptrs[other], b_ptr)
        dh_ptr = tl.where(group == other, dh_ptrs[other], dh_ptr)
    # The two kinds of tiles alternate until one is used up; then come the remaining tiles of the other.
    alternating = 2 * min(dh_tiles, db_tiles)
    computes_dh = tl.where(program < alternating, program % 2 == 0, dh_tiles > db_tiles)
    block = tl.where(program < alternating, program // 2, program - alternating // 2)
    if computes_dh:
        _dh_tile(dy_ptr, b_ptr, dh_ptr, block, T, m, dh_stride, M_PADDED, ALPHA, EVEN_T, EVEN_M, H, TAIL, PAD_HEAD,
                 PAD_TAIL, ACC, BLOCK, BLOCK_SUM)  # fmt: skip
    else:
        db_ptr += group.to(tl.int64) * H * m
        _dB_tile(dy_ptr, h_ptr, db_ptr, block, T, m, h_stride, T_PADDED, ALPHA, EVEN_T, EVEN_M, H, TAIL, PAD_HEAD,
                 PAD_TAIL, ACC, BLOCK, BLOCK_SUM)  # fmt: skip


def up_proj_backward(dys: list[Tensor], h: Tensor, Bs: list[Tensor], alpha: float, dh: Tensor) -> list[Tensor]:
    """Write alpha · dy Bᵀ of each projection to dh, and return alpha · hᵀ dy.

    Adjacent projections with the same number of out features share a launch.

    Args:
        dys: One [T, m] per projection, contiguous.
        h: [G, T, H], with any stride between rows and projections. See `is_profitable` for the alignment.
        Bs: One [H, m] per projection, contiguous.
        alpha: Scaling of the up projection.
        dh: [G, T, H], written, with any stride between rows and projections.

    Returns:
        dB of each projection, [H, m] in float32 or wider.
    """
    dBs: list[Tensor] = []
    for _, same_width in groupby(dys, key=lambda dy: dy.shape[1]):
        chosen = slice(len(dBs), len(dBs) + len(list(same_width)))
        dBs += _backward_same_width(dys[chosen], h[chosen], Bs[chosen], alpha, dh[chosen])
    return dBs


def _backward_same_width(
    dys: list[Tensor], h: Tensor, Bs: list[Tensor], alpha: float, dh: Tensor
) -> tuple[Tensor, ...]:
    """Launch the kernel for projections with the same number of out features."""
    (T, m), G, H = dys[0].shape, len(dys), len(Bs[0])
    dBs = torch.empty(G, H, m, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    ranks, block, block_sum = split_tile(H, MIN_RIGHT_COLUMNS), LAUNCH["BLOCK"], LAUNCH["BLOCK_SUM"]
    t_padded, m_padded = _padded_tokens(T, block_sum), cdiv(m, block_sum) * block_sum
    launch(
        _up_proj_backward_kernel, (G * (cdiv(T, block) + cdiv(m, block)),),
        tuple(dys), tuple(h), tuple(Bs), tuple(dh), dBs, T, m, h.stride(1), dh.stride(1), t_padded, m_padded,
        ALPHA=alpha, EVEN_T=(t_padded == T), EVEN_M=(m == m_padded), H=H, PAD_HEAD=ranks.head, TAIL=ranks.tail,
        PAD_TAIL=ranks.pad_tail, ACC=accumulator_dtype(h.dtype), **LAUNCH | {"num_stages": _stages(H, h.device)},
    )  # fmt: skip
    return dBs.unbind()


def _padded_tokens(T: int, block: int) -> int:
    """Round T up to tiles, and up to an eighth further.

    Few different lengths mean few compilations.
    """
    tiles = cdiv(T, block)
    step = 1 << max(0, tiles.bit_length() - 4)
    return cdiv(tiles, step) * step * block
