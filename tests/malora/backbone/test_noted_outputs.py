"""What the kernels note of their outputs computes these again."""

import pytest
import torch

pytest.importorskip("triton")
from malora.backbone.kernels import add_rms_norm, glu, rms_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _of_glu(x, w):
    return glu.glu(x, x + 1, "silu")


def _of_packed_glu(x, w):
    return glu.packed_glu(x, "gelu_tanh")


def _of_norm(x, w):
    return rms_norm.rms_norm(x, w, 1e-5, 1.0)


def _of_heads(x, w):
    return rms_norm.rms_norm(x.view(2, 3, 4, 8).transpose(1, 2), w[:8], 1e-5)


def _of_sum_and_norm(x, w):
    return add_rms_norm.add_rms_norm(x, x, w, 1e-5)[1]


@pytest.mark.parametrize(
    "module, run",
    [
        (glu, _of_glu),
        (glu, _of_packed_glu),
        (rms_norm, _of_norm),
        (rms_norm, _of_heads),
        (add_rms_norm, _of_sum_and_norm),
    ],
)
def test_a_noted_output_is_computed_again(module, run, monkeypatch):
    noted = []
    monkeypatch.setattr(module, "note", lambda *call: noted.append(call))
    torch.manual_seed(0)
    y = run(torch.randn(2, 3, 32, device=DEVICE, requires_grad=True), torch.randn(32, device=DEVICE))
    ((output, function, *inputs),) = noted
    assert output.requires_grad and output.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(function(*inputs), output)  # a GPU may add up in another order
