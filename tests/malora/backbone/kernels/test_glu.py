"""Gated linear units, through Triton's interpreter or on a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

kernels = pytest.importorskip("malora.backbone.kernels.glu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUNCTIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
assert set(FUNCTIONS) == set(kernels.ACTIVATIONS)


def check(result, expected, inputs):
    grad = torch.randn(expected.shape, device=DEVICE)
    gradients = torch.autograd.grad(result, inputs, grad), torch.autograd.grad(expected, inputs, grad.double())
    torch.testing.assert_close(result, expected.float())
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 1100), (4, 8)])
def test_separate_inputs(activation, shape):
    torch.manual_seed(0)
    gate, up = (4 * torch.randn(shape, device=DEVICE) for _ in range(2))
    gate.requires_grad_(), up.requires_grad_()
    expected = FUNCTIONS[activation](gate.double()) * up.double()
    check(kernels.glu(gate, up, activation), expected, (gate, up))


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_column_halves_of_one_matrix(activation):
    torch.manual_seed(0)
    gate_up = torch.randn(2, 5, 70, device=DEVICE, requires_grad=True)
    gate, up = gate_up.double().chunk(2, -1)
    check(kernels.packed_glu(gate_up, activation), FUNCTIONS[activation](gate) * up, (gate_up,))


def test_rows_may_have_any_stride_and_large_inputs_stay_finite():
    wide = torch.tensor([[-3e4, 0.0, 3e4, 1.0, 2.0, 3.0]], device=DEVICE).expand(3, 6)
    for activation, function in FUNCTIONS.items():
        y = kernels.glu(wide[:, :3], wide[:, 3:], activation)
        torch.testing.assert_close(y, function(wide[:, :3]) * wide[:, 3:])


def test_results_in_16_bits_are_rounded_once():
    torch.manual_seed(0)
    gate, up = (torch.randn(50, 64, device=DEVICE).half() for _ in range(2))
    y, wide = kernels.glu(gate, up, "silu"), F.silu(gate.float()) * up.float()
    assert (y != wide.half()).float().mean() < 0.01 < (y != F.silu(gate) * up).float().mean()


def test_no_rows():
    empty = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    kernels.packed_glu(empty, "silu").sum().backward()
    assert empty.grad.shape == (0, 8)
