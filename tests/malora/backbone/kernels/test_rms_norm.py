"""RMSNorm, through Triton's interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

rms_norm = pytest.importorskip("malora.backbone.kernels.rms_norm").rms_norm
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("shape", [(2, 3, 64), (70, 40), (1, 1), (3, 3000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_result_and_gradient_equal_those_in_float64(shape, offset):
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    weight, grad = torch.randn(shape[-1], device=DEVICE), torch.randn(shape, device=DEVICE)
    y = rms_norm(x, weight, 1e-5, offset)
    expected = F.rms_norm(x.double(), weight.shape, weight.double() + offset, 1e-5)
    torch.testing.assert_close(y, expected.float())
    (got,), (wanted,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad.double())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_heads_in_the_order_of_tokens_stay_so():
    torch.manual_seed(0)
    heads = torch.randn(2, 7, 4, 16, device=DEVICE).transpose(1, 2)
    weight = torch.rand(16, device=DEVICE)
    y = rms_norm(heads, weight, 1e-5)
    assert y.stride() == heads.stride()
    torch.testing.assert_close(y, F.rms_norm(heads, (16,), weight, 1e-5))
