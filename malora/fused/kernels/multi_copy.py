"""One-launch copy of many float32 weights into one packed buffer.

The buffer has another dtype.

    target_i = cast(source_i)        for all i

1. The sources are cut into blocks of at most BLOCK elements.
2. A table in GPU memory has one row per block: the address of its first element, its offset in the buffer, its size.
3. Program k copies the block of row k. So tensors of all sizes keep the multiprocessors equally busy.
4. The table is built once for a set of addresses, and reused as long as the weights stay where they are.

| symbol | meaning | size |
| --- | --- | --- |
| source | a weight | any shape, float32 |
| target | a view of the buffer | shape of its source |
| buffer | packed weights of a model | [elements] |
| table | address, offset and size per block | [blocks, 3] int64 |

`torch._foreach_copy_` takes a launch for every few dozen tensors, and uses too few thread blocks for the small ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels.launch import launch
from malora.fused.tensor_utils import is_captured

BLOCK = 4096  # elements per program
ALIGNMENT = 16  # elements, of addresses, offsets and sizes: Triton then moves 16 bytes at a time
MIN_TENSORS = 32  # up to here `torch._foreach_copy_` needs a single launch
MAX_TABLES = 8  # bounds the memory of tables if the weights keep moving

Key = tuple[tuple[int, int, int], ...]  # address, size and offset of each pair
Tables = dict[Key, Tensor]


@triton.jit
def _copy_kernel(table_ptr, buffer_ptr, BLOCK: tl.constexpr):
    """Copy the block that row `program_id` of the table describes."""
    row_ptr = table_ptr + tl.program_id(0) * 3
    source_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(tl.float32)), 16)
    start = tl.multiple_of(tl.load(row_ptr + 1), 16)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < tl.multiple_of(tl.load(row_ptr + 2), 16)
    tl.store(buffer_ptr + start + offsets, tl.load(source_ptr + offsets, mask=mask), mask=mask)


def multi_tensor_copy(sources: list[Tensor], targets: list[Tensor], buffer: Tensor, tables: Tables) -> None:
    """Copy each source to its target, cast to the dtype of the buffer.

    On a GPU, aligned contiguous float32 sources share one launch if there are more than a few. torch copies the others.

    Args:
        sources: Weights on one device.
        targets: One view of `buffer` per source, of the same shape.
        buffer: [elements].
        tables: Cache of the tables, owned by the caller. It must live as long as the weights, since CUDA graphs that
            captured the copy read the tables in each replay.
    """
    if buffer.is_cuda and len(sources) > MIN_TENSORS:
        pairs = list(zip(sources, targets, strict=True))
        fits = [_fits(*pair) for pair in pairs]
        table = _find_table([pair for pair, fit in zip(pairs, fits, strict=True) if fit], tables)
        if table is not None:
            copy_with_table(table, buffer)
            others = [pair for pair, fit in zip(pairs, fits, strict=True) if not fit]
            sources, targets = [source for source, _ in others], [target for _, target in others]
    if sources:
        torch._foreach_copy_(targets, sources)


def copy_with_table(table: Tensor, buffer: Tensor) -> None:
    """Copy the blocks of a table into the buffer.

    Args:
        table: [blocks, 3] int64, the rows of `table_rows`.
        buffer: [elements], contiguous, in any floating dtype.
    """
    launch(_copy_kernel, (len(table),), table, buffer, BLOCK=BLOCK)


def table_rows(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int, int]]:
    """Return the table rows of (source, target) pairs.

    There is one row per block: its address, its offset in the buffer and its size.
    """
    return [
        (source.data_ptr() + 4 * start, int(target.storage_offset()) + start, min(BLOCK, source.numel() - start))
        for source, target in pairs
        for start in range(0, source.numel(), BLOCK)
    ]


def _fits(source: Tensor, target: Tensor) -> bool:
    """Return whether the kernel can copy this pair."""
    places = (source.numel(), source.data_ptr() // 4, target.storage_offset())
    is_plain = source.is_contiguous() and target.is_contiguous() and source.device == target.device
    return is_plain and source.dtype == torch.float32 and not any(place % ALIGNMENT for place in places)


def _find_table(pairs: list[tuple[Tensor, Tensor]], tables: Tables) -> Tensor | None:
    """Return the table of the pairs, built if needed.

    None while a CUDA graph is captured, since building copies from the host, and if there are MAX_TABLES tables.
    """
    key = tuple((source.data_ptr(), source.numel(), int(target.storage_offset())) for source, target in pairs)
    if key not in tables and pairs and not is_captured(pairs[0][1]) and len(tables) < MAX_TABLES:
        tables[key] = torch.tensor(table_rows(pairs), device=pairs[0][1].device)
    return tables.get(key)
