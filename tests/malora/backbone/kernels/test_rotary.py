"""Rotary position embedding, through Triton's interpreter or on a GPU."""

import pytest
import torch

rotary = pytest.importorskip("malora.backbone.kernels.rotary").rotary
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B, S, D = 2, 5, 16


def reference(x, cos, sin):
    R = cos.shape[-1]
    x1, x2 = x[..., :R].chunk(2, -1)
    rotated = x[..., :R] * cos[:, None] + torch.cat([-x2, x1], -1) * sin[:, None]
    return torch.cat([rotated, x[..., R:]], -1)


@pytest.mark.parametrize("R", [16, 12])
@pytest.mark.parametrize("batch", [1, B])
def test_heads_that_are_columns_of_one_matrix(R, batch):
    """Queries have four heads, keys two, as in grouped attention."""
    torch.manual_seed(0)
    qkv = torch.randn(B, S, 8 * D, device=DEVICE, requires_grad=True)
    q, k = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in (qkv[..., : 4 * D], qkv[..., 4 * D : 6 * D]))
    cos, sin = (torch.randn(batch, S, R, device=DEVICE) for _ in range(2))
    results, expected = rotary(q, k, cos, sin), [reference(x, cos, sin) for x in (q, k)]
    grads = [torch.randn_like(x) for x in expected]
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted)
        assert got.transpose(1, 2).is_contiguous()
    got, wanted = (torch.autograd.grad(outputs, qkv, grads, retain_graph=True) for outputs in (results, expected))
    torch.testing.assert_close(got, wanted)


def test_angles_in_float32_and_contiguous_heads_in_16_bits():
    torch.manual_seed(0)
    q, k = (torch.randn(B, 3, S, D, device=DEVICE).half() for _ in range(2))
    cos, sin = (torch.randn(1, S, D, device=DEVICE) for _ in range(2))
    for got, x in zip(rotary(q, k, cos, sin), (q, k), strict=True):
        assert (got != reference(x.float(), cos, sin).half()).float().mean() < 0.01
        assert got.is_contiguous()
