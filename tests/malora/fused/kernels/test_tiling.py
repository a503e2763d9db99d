"""Tiles that cover a size: one power of two, or two that are smaller in sum."""

import pytest

from malora.fused.kernels.tiling import SplitTile, split_tile


@pytest.mark.parametrize(
    "size, head, tail, pad_tail",
    [(8, 16, 0, 16), (24, 32, 0, 16), (40, 32, 8, 16), (64, 64, 0, 16), (96, 64, 32, 32), (192, 128, 64, 64)],
)
def test_a_size_is_split_in_two_tiles_where_they_are_smaller(size, head, tail, pad_tail):
    tile = split_tile(size)
    assert tile == SplitTile(head, tail, pad_tail)
    assert tile.padded == head + (pad_tail if tail else 0) >= size
