"""The memory of gradients that captured passes share."""

import pytest
import torch
from torch import nn

from malora.backbone import captured_pass
from malora.backbone.captured_pass import Gradients


def model_with_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    model(torch.ones(1, 3)).sum().backward()
    return model


def test_gradients_that_are_there_move():
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    gradients = Gradients(model)
    for parameter, total, expected in zip(gradients.parameters, gradients.sums, before, strict=True):
        assert parameter.grad is total and total.equal(expected)


@pytest.mark.parametrize("max_bytes", [1, 60, 1 << 20])
def test_a_pass_is_added_whatever_waits(max_bytes, monkeypatch):
    """Each parameter gets two gradients in the pass, as under reentrant checkpointing."""
    monkeypatch.setattr(captured_pass, "MAX_WAITING_BYTES", max_bytes)
    model, x = model_with_gradients(), torch.randn(5, 3)
    gradients = Gradients(model)
    first = [total.clone() for total in gradients.sums]

    def run():
        for part in x.split(3):
            model(part).square().sum().backward()
        return "outputs"

    outputs, trained = gradients.add_pass(run)
    assert outputs == "outputs" and trained == [0, 1, 2]
    added = torch.autograd.grad(model(x).square().sum(), gradients.parameters)
    for parameter, total, before, gradient in zip(gradients.parameters, gradients.sums, first, added, strict=True):
        torch.testing.assert_close(total, before + gradient)
        assert parameter.grad is total and not parameter._post_accumulate_grad_hooks
