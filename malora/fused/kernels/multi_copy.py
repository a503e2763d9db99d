"""Narrow copies of a model's weights in one launch.

`torch._foreach_copy_` launches a kernel for every few dozen tensors, and gives a tensor of a small model to so few
blocks of threads that a GPU stands idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.tensor_utils import is_captured

BLOCK = 4096  # elements a program
ALIGNMENT = 16  # of addresses and sizes: Triton then knows that it may move 16 bytes at a time
MIN_TENSORS = 32  # tensors that one launch of torch's takes anyway
MAX_TABLES = 8  # of a model whose weights do not stay where they are


@triton.jit
def _copy_kernel(table_ptr, flat_ptr, BLOCK: tl.constexpr):
    entry = table_ptr + tl.program_id(0) * 3
    source_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.float32)), 16)
    start = tl.multiple_of(tl.load(entry + 1), 16)
    place = tl.arange(0, BLOCK)
    inside = place < tl.multiple_of(tl.load(entry + 2), 16)
    tl.store(flat_ptr + start + place, tl.load(source_ptr + place, mask=inside), mask=inside)


def multi_tensor_copy(sources: list[Tensor], targets: list[Tensor], flat: Tensor, tables: dict[tuple, Tensor]) -> None:
    """Copies each source to its target, a view of `flat`.

    `tables` must live as long as the weights do: CUDA graphs read what is in it.
    """
    if flat.is_cuda and len(sources) > MIN_TENSORS:
        fitting = [_fits(source, target) for source, target in zip(sources, targets, strict=True)]
        pairs = zip(sources, targets, strict=True)
        table = _table([pair for pair, fits in zip(pairs, fitting, strict=True) if fits], tables)
        if table is not None:
            copy_with_table(table, flat)
            sources = [source for source, fits in zip(sources, fitting, strict=True) if not fits]
            targets = [target for target, fits in zip(targets, fitting, strict=True) if not fits]
    if sources:
        torch._foreach_copy_(targets, sources)


def copy_with_table(table: Tensor, flat: Tensor) -> None:
    """Each row of a table [blocks, 3] is an address of float32 numbers, where they go in `flat`, and how many."""
    _copy_kernel[(len(table),)](table, flat, BLOCK=BLOCK)


def table_rows(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int, int]]:
    return [
        (source.data_ptr() + 4 * start, target.storage_offset() + start, min(BLOCK, source.numel() - start))
        for source, target in pairs
        for start in range(0, source.numel(), BLOCK)
    ]


def _fits(source: Tensor, target: Tensor) -> bool:
    at = (source.numel(), source.data_ptr() // 4, target.storage_offset())
    is_plain = source.is_contiguous() and target.is_contiguous() and source.device == target.device
    return is_plain and source.dtype == torch.float32 and not any(place % ALIGNMENT for place in at)


def _table(pairs: list[tuple[Tensor, Tensor]], tables: dict[tuple, Tensor]) -> Tensor | None:
    """The table on the device; None where a CUDA graph that is being captured could not wait for it to be made."""
    key = tuple((source.data_ptr(), source.numel(), target.storage_offset()) for source, target in pairs)
    if key not in tables and pairs and not is_captured(pairs[0][1]) and len(tables) < MAX_TABLES:
        tables[key] = torch.tensor(table_rows(pairs), device=pairs[0][1].device)
    return tables.get(key)
