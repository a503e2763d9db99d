"""Quantized backbones with random weights."""

import sys

import pytest
import torch
from torch import nn

from bench.errors import UserError
from bench.models.backbone import SHAPES, backbone

CPU = torch.device("cpu")


@pytest.mark.parametrize("base, linear", [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_the_decoder_is_quantized_and_the_head_is_not(base, linear):
    pytest.importorskip("bitsandbytes")
    model = backbone(SHAPES["toy"], 1, CPU, base)
    plain = backbone(SHAPES["toy"], 1, CPU)
    kinds = [type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)]
    assert kinds == [linear] * 7 + ["Linear"]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
    ids = torch.randint(512, (2, 16))
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(6.24, abs=0.1)  # log 512, as with any weights


def test_without_bitsandbytes_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--base nf4 needs bitsandbytes, which is not installed"):
        backbone(SHAPES["toy"], 1, CPU, "nf4")
