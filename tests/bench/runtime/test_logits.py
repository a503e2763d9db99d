"""Logits at label positions against a full forward pass, with every kind of adapter on the output head."""

from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import malora
from bench.runtime.logits import label_positions_only

ROW, COLUMN = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 8, 0, 7])
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
HEAD: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
ONE: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
NO_HEAD: dict[str, Any] = {"target_modules": ["q_proj"]}

# By name: the config, and if input embeddings and head share their weights.
ADAPTERS = {
    "lora beside the head": (LoraConfig(r=4, **ONE), False),
    "lora": (LoraConfig(r=4, **HEAD), False),
    "lora, tied": (LoraConfig(r=4, **HEAD), True),
    "rslora with a bias": (LoraConfig(r=4, use_rslora=True, lora_bias=True, **HEAD), False),
    "dora": (LoraConfig(r=4, use_dora=True, **HEAD), False),
    "ia3": (IA3Config(feedforward_modules=[], **HEAD), False),
    "loha": (LoHaConfig(r=4, **HEAD), False),
    "oft": (OFTConfig(oft_block_size=4, r=0, **HEAD), False),
    "vera": (VeraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"), False),
    "modules_to_save": (LoraConfig(r=4, modules_to_save=["lm_head"], **ONE), False),
    "embeddings saved, tied": (LoraConfig(r=4, modules_to_save=["embed_tokens"], **ONE), True),
    "trainable tokens": (LoraConfig(r=4, trainable_token_indices={"embed_tokens": [5, 6, 7]}, **ONE), False),
    "trainable tokens, tied": (LoraConfig(r=4, trainable_token_indices={"embed_tokens": [5, 6, 7]}, **ONE), True),
    "malora": (malora.METHODS["malora"](r=4, d=8, **HEAD), False),
    "asylora": (malora.METHODS["asylora"](r=4, **HEAD), False),
    "malora, head saved": (malora.METHODS["malora"](r=4, d=8, modules_to_save=["lm_head"], **NO_HEAD), False),
}


def make(adapter, dtype=torch.float32):
    """Return a model with a random adapter, in evaluation mode."""
    config, tied = ADAPTERS[adapter] if adapter else (None, False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=61, tie_word_embeddings=tied)).to(dtype)
    if config is None:
        return model.eval()
    model = get_peft_model(model.requires_grad_(False), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def at_labels(model, in_float32):
    with torch.no_grad(), label_positions_only(model, ROW, COLUMN, in_float32=in_float32):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_are_those_of_a_full_forward_pass(adapter, in_float32):
    model = make(adapter)
    with torch.no_grad():
        full = model(input_ids=IDS).logits[ROW, COLUMN]
    torch.testing.assert_close(at_labels(model, in_float32), full, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=IDS).logits[ROW, COLUMN]
        torch.testing.assert_close(at_labels(model, in_float32), base, rtol=1e-4, atol=1e-5)
    assert (full - base).abs().max() > 0.01  # the adapter matters


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_head_of_a_bfloat16_model_runs_in_float32(adapter):
    """The hidden states are those of the bfloat16 model; the head in float32 gives logits that do not tie."""
    model, reference = make(adapter, torch.bfloat16), make(adapter)
    with torch.no_grad():  # what was drawn in bfloat16
        for target, drawn in zip(tensors_of(reference), tensors_of(model), strict=True):
            target.copy_(drawn)
    hidden = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    logits = at_labels(model, in_float32=True)
    handle.remove()
    assert logits.dtype == torch.float32
    with torch.no_grad():
        expected = reference.get_output_embeddings()(hidden[0][ROW, COLUMN].float())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_plain_head_gives_the_same_digits_as_before():
    model = make(None, torch.bfloat16)
    hidden = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    logits = at_labels(model, in_float32=True)
    handle.remove()
    weight = model.lm_head.weight.float()
    assert torch.equal(logits, nn.functional.linear(hidden[0][ROW, COLUMN].float(), weight))


def test_merged_adapters_on_the_head_count_once():
    model = make("asylora")
    with torch.no_grad():
        full = model(input_ids=IDS).logits[ROW, COLUMN]
        model.merge_adapter()
    torch.testing.assert_close(at_labels(model, in_float32=True), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [
    PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
])  # fmt: skip
def test_virtual_tokens_are_refused(config):
    model = get_peft_model(make(None), config)
    with pytest.raises(ValueError, match="virtual tokens"):
        at_labels(model, in_float32=True)


def test_a_model_without_a_head_is_refused():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        at_labels(LlamaModel(LlamaConfig(**sizes, vocab_size=61)), in_float32=True)
