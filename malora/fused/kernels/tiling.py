"""Tile sizes, accumulator dtypes and a wait that all matmul kernels share.

A kernel processes a matrix in tiles. Triton wants the sides of a tile to be powers of two, and `tl.dot`, the matmul of
two tiles, wants them to be at least 16. A size in between is padded: its tile is larger, and the padding is masked when
it is loaded and stored.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.tensor_utils import next_power_of_2

MIN_TILE = 16  # `tl.dot` accepts no smaller side

# Smallest column count for a right operand of `tl.dot` that is read as it lies in memory. With 16 columns and 128 rows
# Triton 3.6 computed wrong results when the row stride was odd, so that it could not prefetch the operand.
MIN_RIGHT_COLUMNS = 32

# Shared memory that one thread block can use on an H100 (CUDA programming guide, compute capability 9.0).
HOPPER_SHARED_BYTES = 227 << 10


@triton.jit
def wait_for_dot(acc, PTX: tl.constexpr):
    """Return the float32 accumulator of a `tl.dot` once that matmul has finished.

    On Hopper a matmul is asynchronous. Triton 3.6 lets it run on while the loop overwrites its registers (Triton issue
    9433) or the shared memory that it still reads; training then diverged to NaN. Reading the accumulator forces the
    wait. `ptxas` removes the `mov`.
    """
    if PTX:
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


class SplitTile(NamedTuple):
    """A size covered by one tile, or by two where two need less padding.

    Attributes:
        head: Side of the first tile, a power of two.
        tail: Elements left for the second tile, unpadded; 0 if there is none.
        pad_tail: Side of the second tile, a power of two.
    """

    head: int
    tail: int
    pad_tail: int

    @property
    def padded(self) -> int:
        """Sum of the sides of the tiles that are in use."""
        return self.head + (self.pad_tail if self.tail else 0)


@cache
def split_tile(size: int, min_tile: int = MIN_TILE) -> SplitTile:
    """Cover `size` elements by one power-of-two tile, or by two.

    Two are used if they are smaller in sum.
    """
    single = tile_size(size, min_tile)
    head, pad_tail = single // 2, tile_size(size - single // 2, min_tile)
    if head >= min_tile and head + pad_tail < single:
        return SplitTile(head, size - head, pad_tail)
    return SplitTile(single, 0, min_tile)


@cache
def tile_size(size: int, min_tile: int = MIN_TILE) -> int:
    """Return the smallest power of two that is at least `size` and `min_tile`."""
    return max(min_tile, next_power_of_2(size))


@cache
def shared_memory_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that one thread block can use.

    Off a GPU, they are those of an H100.
    """
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # torch's stubs lack it


def fitting_stages(per_stage: int, device: torch.device, *, max_stages: int, fixed: int = 0) -> int:
    """Return the number of stages of prefetched tiles that fit into shared memory.

    It is at most `max_stages`, and 0 if none fits.

    Args:
        per_stage: Bytes that each stage takes.
        device: Device of the kernel.
        max_stages: Upper bound of the result.
        fixed: Bytes that the kernel takes besides.
    """
    return max(0, min(max_stages, (shared_memory_bytes(device) - fixed) // per_stage))


def has_ptx(x: Tensor) -> bool:
    """Return whether kernels over x compile to PTX, that is, run on an NVIDIA GPU."""
    return x.is_cuda and not torch.version.hip


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of accumulators: float64 for float64 data, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
