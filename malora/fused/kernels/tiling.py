"""What the kernels of products share: sizes of their blocks, in what they sum, and how they wait.

Triton's blocks are powers of two, of a product's sides 16 or more.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a product's right side that lie as they do in memory. Triton 3.6 made a wrong product of 16, 128 rows deep,
# where it could not copy them ahead: their rows began at odd places.
MIN_RIGHT_COLUMNS = 32
HOPPER_SHARED_BYTES = 227 << 10  # bytes of shared memory that a block of threads can have on an H100


@triton.jit
def wait_for_dot(sums, PTX: tl.constexpr):
    """The sums of a product, float32, once it has ended."""
    # On Hopper a product may run on while its loop writes the registers (Triton 3.6, its issue 9433) or the buffer that
    # it still reads, and AsyLoRA trained to NaN. Whoever reads the sums waits for them; ptxas drops the mov.
    if PTX:
        sums = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [sums], dtype=tl.float32, is_pure=True, pack=1)
    return sums


def split_tile(rows: int, least: int = 16) -> dict[str, int]:
    """Rows as one block, padded to a power of two, or as two, padded each, where those are fewer."""
    whole = tile_size(rows, least)
    first, pad_rest = whole // 2, tile_size(rows - whole // 2, least)
    if first >= least and first + pad_rest < whole:
        return {"first": first, "rest": rows - first, "pad_rest": pad_rest}
    return {"first": whole, "rest": 0, "pad_rest": least}


def tile_size(size: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(size))  # tl.dot takes no less than 16


@cache
def shared_memory_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have."""
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if device.type == "cuda"
        else HOPPER_SHARED_BYTES
    )


def has_ptx(x: Tensor) -> bool:
    """Whether kernels over x are compiled to what Nvidia's GPUs read."""
    return x.is_cuda and not torch.version.hip


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    """What kernels sum in."""
    return tl.float64 if dtype == torch.float64 else tl.float32
