"""Tile sizes of the down-projection kernels.

The module also says when to use torch's matmuls instead.

Both kernels walk over x [T, n] in tiles and keep all Z + L columns of their output in registers. That bounds Z and L,
and the number of tiles that can be prefetched is bounded by shared memory.

| symbol | meaning |
| --- | --- |
| T, n | tokens, in features |
| Z | rows of the stacked down projections |
| L | rows of the stacked routers |
| stages | tiles that are loaded in advance of the matmul (`num_stages` of Triton) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from malora.fused.kernels import tiling
from malora.fused.kernels.dropout import rescale
from malora.fused.kernels.tiling import accumulator_dtype, has_ptx, split_tile, tile_size
from malora.fused.tensor_utils import next_power_of_2, round_up

TARGET_PROGRAMS = 264  # two per multiprocessor of an H100
# Tiles of features per split of the forward sum. Shorter splits make the gate kernel add more of them. Tuned when the
# splits were added by a kernel of their own.
MIN_BLOCKS_PER_SPLIT = 16
MAX_ROWS = 256  # bound of Z and of L: beyond it the accumulators of a tile of tokens do not fit into registers


@dataclass(frozen=True)
class TunedLaunch:
    """Tile sizes of one of the kernels.

    Attributes:
        block_t: Tokens per tile.
        block_n: In features per tile.
        max_stages: Largest number of prefetched tiles.
        is_backward: Whether it is the backward kernel, whose use of shared memory differs.
    """

    block_t: int
    block_n: int
    max_stages: int
    is_backward: bool

    @cache  # noqa: B019 - there are two instances, and they live as long as the process
    def shared_bytes(self, Z: int, L: int) -> tuple[int, int]:
        """Return the shared memory in bytes, fixed and per stage.

        Counted for 16-bit elements, as Triton 3.6 allocates it for Hopper.

        Each stage has a buffer for every tile that the loop loads. The backward kernel also keeps a tile of the
        weights for the duration of the loop, and a second copy of the tile of x in another layout.
        """
        rows = split_tile(Z).padded + (tile_size(L) if L else 0)
        if self.is_backward:
            fixed, loaded_columns = 2 * (self.block_t + rows) * self.block_n, self.block_t
        else:
            fixed, loaded_columns = 0, self.block_n
        return 1024 + fixed, 2 * (self.block_t * self.block_n + rows * loaded_columns)

    def stages(self, Z: int, L: int, device: torch.device) -> int:
        """Return the number of stages that fit into shared memory.

        It is at most `max_stages`, and 0 if not even one fits.
        """
        fixed, per_stage = self.shared_bytes(Z, L)
        return tiling.fitting_stages(per_stage, device, fixed=fixed, max_stages=self.max_stages)

    def options(self, Z: int, L: int, device: torch.device) -> dict[str, int]:
        """Return the launch options; many output columns are spread over more warps."""
        stages = self.stages(Z, L, device)
        num_warps = 4 if Z + L <= 224 else 8
        return {"BLOCK_T": self.block_t, "BLOCK_N": self.block_n, "num_stages": stages, "num_warps": num_warps}


# The fastest tried on an H100 with 4,096 tokens and 4,096 or 11,008 in features.
FORWARD = TunedLaunch(block_t=64, block_n=64, max_stages=3, is_backward=False)
BACKWARD = TunedLaunch(block_t=64, block_n=64, max_stages=3, is_backward=True)


def prefers_plain_matmul(x: Tensor, Z: int, L: int) -> bool:
    """Return whether to drop out x in a pass of its own and call torch's matmuls.

    That is so if the accumulators or the tiles do not fit, and for 32-bit data on a GPU: without tensor cores the
    arithmetic costs more than the additional passes over x. It is also so for an empty x, which has no tiles.
    """
    if Z > MAX_ROWS or L > MAX_ROWS or not x.numel() or (x.is_cuda and x.element_size() > 2):
        return True
    return not (FORWARD.stages(Z, L, x.device) and BACKWARD.stages(Z, L, x.device))


def split_count(programs: int, max_splits: int, target: int = TARGET_PROGRAMS) -> int:
    """Return the number of splits (split-K) of a sum.

    It is chosen so that about `target` programs run. It is a power of two, since each different count compiles a kernel
    of its own. It is at most the power of two next to `max_splits`.

    Args:
        programs: Programs of the launch without splits.
        max_splits: Tiles of the sum, divided by the fewest tiles worth a split.
        target: Programs that keep the device busy.
    """
    wanted = 2 ** max(0, round(math.log2(target / programs)))
    return int(min(wanted, next_power_of_2(max(1, max_splits))))


def matmul_tn_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ @ right in float32 (float64 for float64 data).

    The product is accumulated in that dtype too.

    Args:
        left: [..., T, a].
        right: [..., T, b].

    Returns:
        [..., a, b].
    """
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left.mT, right, out_dtype=torch.float32)
    return (left.mT @ right).to(torch.promote_types(left.dtype, torch.float32))


def aligned_rows(x: Tensor, columns: int) -> Tensor:
    """Return an uninitialized [len(x), columns] like x, with aligned rows.

    The row stride is a multiple of 16 elements. With another row stride Triton loads and stores single elements, which
    made the matmuls several times slower.
    """
    return x.new_empty(len(x), round_up(columns, 16))[:, :columns]


def tile_constants(weights: Tensor, Z: int, p: float) -> dict[str, Any]:
    """Return the compile-time constants that both kernels take.

    Args:
        weights: [Z + L, n].
        Z: Rows of the stacked down projections.
        p: Dropout probability.
    """
    L, z = len(weights) - Z, split_tile(Z)
    return {
        "SCALE": rescale(p), "Z": Z, "L": L, "PAD_HEAD": z.head, "TAIL": z.tail, "PAD_TAIL": z.pad_tail,
        "PAD_L": tile_size(L), "ACC": accumulator_dtype(weights.dtype), "PTX": has_ptx(weights),
    }  # fmt: skip
