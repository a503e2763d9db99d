"""Copies by table, on a GPU or in Triton's interpreter: each where it belongs, and nothing beside it."""

import pytest
import torch

from malora.fused.kernels.multi_copy import BLOCK, copy_with_table, multi_tensor_copy, table_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8, 64), (3, 16), (2, BLOCK), (5, 16), (BLOCK + 16,), (7, 3), (1, 16)]


def made():
    torch.manual_seed(0)
    sources = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    flat = torch.zeros(sum(2 * s.numel() for s in sources) // 64 * 64 + 64 * 64, dtype=torch.float16, device=DEVICE)
    targets, start = [], 64
    for source in sources:
        targets.append(flat[start : start + source.numel()].view(source.shape))
        start += -(-source.numel() // 64) * 64 + 64
    return sources, targets, flat


def test_a_table_copies_each_source_to_its_place():
    sources, targets, flat = made()
    fitting = [pair for pair in zip(sources, targets, strict=True) if pair[0].numel() % 16 == 0]
    copy_with_table(torch.tensor(table_rows(fitting), device=DEVICE), flat)
    for source, target in fitting:
        assert torch.equal(target, source.half())
    assert flat.count_nonzero() == sum(source.half().count_nonzero() for source, _ in fitting)


@pytest.mark.parametrize("times", [1, 20])
def test_all_are_copied_however_many_and_whatever_their_shape(times):
    """On a GPU those of a kind by table, where they are more than a few."""
    sources, _, flat = made()
    flat = torch.zeros(times * len(flat), dtype=torch.bfloat16, device=DEVICE)
    sources = [source.clone() for _ in range(times) for source in sources]
    wide = torch.randn(6, 20, device=DEVICE)[:, :16]  # not contiguous
    sources, targets, start = [*sources, wide], [], 0
    for source in sources:
        targets.append(flat[start : start + source.numel()].view(source.shape))
        start += -(-source.numel() // 16) * 16
    tables = {}
    for _ in range(2):
        multi_tensor_copy(sources, targets, flat, tables)
        assert all(torch.equal(target, source.bfloat16()) for source, target in zip(sources, targets, strict=True))
        flat.zero_()
    assert len(tables) == (DEVICE == "cuda" and times > 1)
