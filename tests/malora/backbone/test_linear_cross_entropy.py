"""A frozen head with cross entropy, by torch, and by the kernel through Triton's interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from malora.backbone import linear_cross_entropy as module
from malora.backbone.linear_cross_entropy import LabelPositions, linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["kernel", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "can_run", lambda x: False)
    else:
        pytest.importorskip("triton")


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("selects", [False, True])
def test_loss_and_gradient_equal_those_of_all_logits(path, cap, selects, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS", 61 * 4)  # four rows per chunk
    hidden = (2 * torch.randn(11, 8, device=DEVICE)).requires_grad_()
    weight, bias = torch.randn(61, 8, device=DEVICE), torch.randn(61, device=DEVICE)
    targets = torch.randint(61, (11,), device=DEVICE)
    targets[[0, 4, 5]] = -7
    rows = LabelPositions(targets, -7).rows() if selects else None
    loss = linear_cross_entropy(hidden, weight, bias, targets, rows=rows, ignored=-7, cap=cap)
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets, ignore_index=-7, reduction="sum")
    torch.testing.assert_close(loss, expected.float())
    (got,), (wanted,) = (torch.autograd.grad(value * 3, hidden) for value in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_vocabularies_larger_than_a_block_in_16_bits(path):
    torch.manual_seed(0)
    hidden = torch.randn(3, 16, device=DEVICE).bfloat16().requires_grad_()
    weight, targets = torch.randn(5000, 16, device=DEVICE).bfloat16(), torch.tensor([0, 4999, 4096], device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, None, targets)
    expected = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (got,), (wanted,) = (torch.autograd.grad(value, hidden) for value in (loss, expected))
    assert (got - wanted).float().norm() < 0.01 * wanted.float().norm()


def test_under_autocast_the_head_runs_in_16_bits(path):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8, device=DEVICE, requires_grad=True), torch.randn(9, 8, device=DEVICE)
    targets = torch.arange(4, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, None, targets)
        logits = F.linear(hidden, weight)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets, reduction="sum"))
    loss.backward()
    assert hidden.grad.dtype == torch.float32


def test_a_label_outside_of_the_vocabulary_is_no_silent_number():
    pytest.importorskip("triton")
    hidden, weight = torch.ones(1, 4, device=DEVICE), torch.ones(5, 4, device=DEVICE)
    assert linear_cross_entropy(hidden, weight, None, torch.tensor([5], device=DEVICE)).isnan()
