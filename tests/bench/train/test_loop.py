"""The input dtype of PEFT's LoRA in the training loop."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import malora
from bench.train.loop import keep_input_dtype
from tests.conftest import make_model


@pytest.mark.parametrize("method, active", [("lora", True), ("dora", False), ("malora", False)])
def test_lora_computes_the_same_without_casting_its_inputs(method, active, ids):
    """Compare bitwise, under bfloat16 autocast.

    `keep_input_dtype` is told that the device is a GPU.
    """

    def computed(device: str):
        model = get_peft_model(make_model().bfloat16(), malora.METHODS[method](lora_dropout=0.0)).train()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(generator=torch.Generator().manual_seed(0))
        with keep_input_dtype(model, torch.device(device)), torch.autocast("cpu", torch.bfloat16):
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            casts = [layer.cast_input_dtype_enabled for layer in layers]
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return casts, [loss, *(p.grad for p in model.parameters() if p.requires_grad)]

    (_, expected), (casts, got) = computed("cpu"), computed("cuda")
    assert all(enabled is not active for enabled in casts)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
