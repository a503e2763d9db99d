"""Tile sizes of the down-projection kernels, and what fits into shared memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from malora.fused.kernels import tiling
from malora.fused.kernels.dropout import rescale
from malora.fused.kernels.tiling import accumulator_dtype, has_ptx, split_tile, tile_size

# The fastest of those tried on an H100 at 4,096 tokens and inputs of 4,096 and 11,008.
DOWN = {"BLOCK_T": 64, "BLOCK_N": 64, "num_stages": 3}
GRADIENTS = {"BLOCK_T": 64, "BLOCK_N": 64, "num_stages": 3}
PROGRAMS = 264  # two for each multiprocessor of an H100
MIN_BLOCKS_PER_SPLIT = 16  # of columns in a part of a sum; not tuned again since the gate's kernel adds up the parts
MAX_ROWS = 256  # of down sides, and of routers beside them; the sums of a block of tokens stay in registers


def prefers_plain_matmul(x: Tensor, Z: int, L: int) -> bool:
    """Whether plain products of a dropped input are better: of many rows a block does not fit, nor of wide elements,
    and the arithmetic, which tensor cores do not do in full float32, then outweighs the passes over the input. Of no
    tokens there are no blocks."""
    if Z > MAX_ROWS or L > MAX_ROWS or not x.numel() or (x.is_cuda and x.element_size() > 2):
        return True
    return not (_stages(DOWN, Z, L, x.device) and _stages(GRADIENTS, Z, L, x.device))


def split_count(blocks: int, others: int, programs: int = PROGRAMS) -> int:
    """In how many parts a sum is cut where `blocks` programs leave the device idle; a power of two, at most `others`.

    The parts are added up in a fixed order, and few different numbers mean few compilations.
    """
    return min(2 ** max(0, round(math.log2(programs / blocks))), triton.next_power_of_2(max(1, others)))


def matmul_tn_fp32(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right of [..., T, a] and [..., T, b], summed and kept in float32 or wider."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left.mT, right, out_dtype=torch.float32)
    return (left.mT @ right).to(torch.promote_types(left.dtype, torch.float32))


def aligned_rows(x: Tensor, columns: int) -> Tensor:
    """Like x.new_empty(len(x), columns), in rows that begin at multiples of 16 elements.

    Otherwise Triton reads and writes an element at a time; the products were four times slower.
    """
    return x.new_empty(len(x), -(-columns // 16) * 16)[:, :columns]


def bytes_of(tuned: dict[str, int], Z: int, L: int, stages: int) -> int:
    """Of shared memory, for elements of two, as Triton 3.6 lays them out for Hopper.

    Loads have a block for each stage. The gradients keep a block of the weights, and lay out one of x anew.
    """
    T, n, z = tuned["BLOCK_T"], tuned["BLOCK_N"], split_tile(Z)
    rows = z["first"] + (z["pad_rest"] if z["rest"] else 0) + (tile_size(L) if L else 0)
    kept, loaded = (2 * (T + rows) * n, T) if tuned is GRADIENTS else (0, n)
    return 1024 + kept + stages * 2 * (T * n + rows * loaded)


def _stages(tuned: dict[str, int], Z: int, L: int, device: torch.device) -> int:
    """Stages of loads that shared memory has room for, at most those of `tuned`; 0 if for none."""
    return max(
        s
        for s in range(tuned["num_stages"] + 1)
        if not s or bytes_of(tuned, Z, L, s) <= tiling.shared_memory_bytes(device)
    )


def fitting(tuned: dict[str, int], Z: int, L: int, device: torch.device) -> dict[str, int]:
    """`tuned`, with as many stages as fit, and more warps where there are many rows."""
    return tuned | {"num_stages": _stages(tuned, Z, L, device), "num_warps": 4 if Z + L <= 224 else 8}


def constants_of(weights: Tensor, Z: int, p: float) -> dict[str, Any]:
    L, z = len(weights) - Z, split_tile(Z)
    return {
        "SCALE": rescale(p), "Z": Z, "L": L, "PAD_Z": z["first"], "REST": z["rest"], "PAD_REST": z["pad_rest"],
        "PAD_L": tile_size(L), "WIDE": accumulator_dtype(weights.dtype), "PTX": has_ptx(weights),
    }  # fmt: skip
