"""Residual sum and RMSNorm in one kernel, through Triton's interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

add_rms_norm = pytest.importorskip("malora.backbone.kernels.add_rms_norm").add_rms_norm
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def reference(x, residual, weight, eps):
    return (total := x + residual), F.rms_norm(total, weight.shape, weight, eps)


@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 40), (1, 1), (3, 576)])
@pytest.mark.parametrize("used", ["both", "sum", "norm"])
def test_results_and_gradients_equal_those_in_float64(shape, used):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.rand(shape[-1], dtype=torch.float64, device=DEVICE) + 0.5
    grads = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    indices = {"both": [0, 1], "sum": [0], "norm": [1]}[used]

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        results = function(*leaves, weight.to(dtype), 1e-5)
        outputs, output_grads = [results[i] for i in indices], [grads[i].to(dtype) for i in indices]
        return [*results, *torch.autograd.grad(outputs, leaves, output_grads)]

    expected, got = run(reference, torch.float64), run(add_rms_norm, torch.float32)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a.float(), rtol=1e-4, atol=1e-5)


def test_the_norm_is_computed_from_the_rounded_sum():
    torch.manual_seed(0)
    x, residual = (torch.randn(50, 64, device=DEVICE).half() for _ in range(2))
    weight = torch.rand(64, device=DEVICE).half() + 0.5
    total, y = add_rms_norm(x, residual, weight, 1e-5)
    assert total.equal(x + residual)

    def share_that_differs(summed):
        return (y != F.rms_norm(summed, (64,), weight.float(), 1e-5).half()).float().mean()

    assert share_that_differs(total.float()) < 0.01 < share_that_differs(x.float() + residual.float())


def test_gradients_may_be_column_slices():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 48, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.rand(48, device=DEVICE)
    slices = [torch.randn(2, 5, 70, device=DEVICE)[..., 16:64] for _ in range(2)]
    got = torch.autograd.grad(add_rms_norm(*inputs, weight, 1e-5), inputs, slices)
    expected = torch.autograd.grad(reference(*inputs, weight, 1e-5), inputs, slices)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a)
