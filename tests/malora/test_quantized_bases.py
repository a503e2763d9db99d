"""Adapters on quantized bases: torchao's int8 weights, and 8 and 4 bits of bitsandbytes."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from malora import METHODS

SIZES = {
    "malora": {"r": 4, "d": 6, "num_experts": 4},
    "molora": {"r": 4, "num_experts": 4},
    "asylora": {"r": 4},
}
# bitsandbytes packs 4 bits on a CPU in blocks of 64.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=61)).eval()


def torchao_base(folder):
    quantization = pytest.importorskip("torchao.quantization")
    base = make_base()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    return base


def bitsandbytes_base(folder, **options):
    pytest.importorskip("bitsandbytes")
    make_base().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


BASES = {
    "torchao int8": torchao_base,
    "bitsandbytes 8 bit": lambda folder: bitsandbytes_base(folder, load_in_8bit=True),
    "bitsandbytes 4 bit": lambda folder: bitsandbytes_base(folder, load_in_4bit=True),
}


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("base", BASES)
def test_an_adapter_on_a_quantized_base_trains_is_saved_and_switched_off(base, method, ids, tmp_path):
    # On a CPU bitsandbytes computes 4 bits by one of two kernels, depending on whether the input needs gradients.
    tolerance = 0.05 if "4 bit" in base else 0
    model = prepare_model_for_kbit_training(BASES[base](tmp_path / "base"), use_gradient_checkpointing=False)
    plain = model(input_ids=ids).logits
    model = get_peft_model(model, METHODS[method](**SIZES[method], lora_dropout=0))
    torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=tolerance, rtol=0)  # B is zero
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = model(input_ids=ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=tolerance, rtol=0)
    model.save_pretrained(tmp_path / "adapter")
    base_model = model.unload()
    torch.testing.assert_close(base_model(input_ids=ids).logits, plain, atol=tolerance, rtol=0)
    # On the same base, since 4 bits of bitsandbytes differ from one load to the next, without an adapter too.
    again = PeftModel.from_pretrained(base_model, tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, trained, atol=tolerance, rtol=0)
