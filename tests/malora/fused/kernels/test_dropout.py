"""The dropout mask: its rate, and its independence.

The rate is that of dropped elements. Adjacent bits are independent, and so are seeds.
"""

import pytest
import torch

from malora.fused.kernels import dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unpack(bits: torch.Tensor, n: int) -> torch.Tensor:
    """Return the mask [T, n] as booleans: True keeps an element."""
    return ((bits[:, :, None] >> torch.arange(32, device=bits.device)) & 1).flatten(1)[:, :n].bool()


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_a_mask_drops_the_given_share_without_a_pattern(p):
    T, n = 512, 256
    mask = unpack(dropout.draw_mask(T, n, torch.tensor([3], device=DEVICE), p), n).double()
    six_sigma = 6 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(1 - p - mask.mean()) < six_sigma + 1 / dropout.LEVELS
    for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(32, 1), mask.roll(8, 0)):
        assert abs(((mask - mask.mean()) * (shifted - mask.mean())).mean()) < six_sigma  # covariance of the two
    other = unpack(dropout.draw_mask(T, n, torch.tensor([4], device=DEVICE), p), n).double()
    assert abs(((mask - mask.mean()) * (other - mask.mean())).mean()) < six_sigma


def test_kept_elements_are_rescaled_and_the_others_are_zero():
    p, x = 0.3, torch.randn(37, 140, device=DEVICE)
    bits = dropout.draw_mask(*x.shape, torch.tensor([3], device=DEVICE), p)
    expected = torch.where(unpack(bits, x.shape[1]), x * dropout.rescale(p), 0.0)
    torch.testing.assert_close(dropout.apply_dropout(x, bits, p), expected)
    assert dropout.rescale(p) == pytest.approx(1 / (1 - p), abs=2 / dropout.LEVELS)
