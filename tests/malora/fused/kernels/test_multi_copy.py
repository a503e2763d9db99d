"""Copies by table, through the interpreter or on a GPU.

Each element is at its place, and no other one is written.
"""

import pytest
import torch

from malora.fused.kernels.multi_copy import BLOCK, copy_with_table, multi_tensor_copy, table_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8, 64), (3, 16), (2, BLOCK), (5, 16), (BLOCK + 16,), (7, 3), (1, 16)]


def make_tensors():
    """Return sources of all shapes, and a float16 buffer with a target view for each."""
    torch.manual_seed(0)
    sources = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    buffer = torch.zeros(sum(2 * s.numel() for s in sources) // 64 * 64 + 64 * 64, dtype=torch.float16, device=DEVICE)
    targets, start = [], 64
    for source in sources:
        targets.append(buffer[start : start + source.numel()].view(source.shape))
        start += -(-source.numel() // 64) * 64 + 64
    return sources, targets, buffer


def test_a_table_copies_each_source_to_its_target():
    sources, targets, buffer = make_tensors()
    fitting = [pair for pair in zip(sources, targets, strict=True) if pair[0].numel() % 16 == 0]
    copy_with_table(torch.tensor(table_rows(fitting), device=DEVICE), buffer)
    for source, target in fitting:
        assert torch.equal(target, source.half())
    assert buffer.count_nonzero() == sum(source.half().count_nonzero() for source, _ in fitting)


@pytest.mark.parametrize("times", [1, 20])
def test_all_sources_are_copied_whatever_their_number_and_shape(times):
    """On a GPU, aligned ones go by table if they are more than a few."""
    sources, _, buffer = make_tensors()
    buffer = torch.zeros(times * len(buffer), dtype=torch.bfloat16, device=DEVICE)
    sources = [source.clone() for _ in range(times) for source in sources]
    not_contiguous = torch.randn(6, 20, device=DEVICE)[:, :16]
    sources, targets, start = [*sources, not_contiguous], [], 0
    for source in sources:
        targets.append(buffer[start : start + source.numel()].view(source.shape))
        start += -(-source.numel() // 16) * 16
    tables = {}
    for _ in range(2):
        multi_tensor_copy(sources, targets, buffer, tables)
        assert all(torch.equal(target, source.bfloat16()) for source, target in zip(sources, targets, strict=True))
        buffer.zero_()
    assert len(tables) == (DEVICE == "cuda" and times > 1)
