"""Small models of the architectures in the guide's table."""

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_HEAD_DIM = {name: value for name, value in _SHAPE.items() if name != "head_dim"}

# By the name in the table.
ARCHITECTURES = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=4)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_NO_HEAD_DIM)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE)),
    "SmolLM3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**_NO_HEAD_DIM)),
    "Phi-3": lambda: Phi3ForCausalLM(Phi3Config(**_NO_HEAD_DIM)),
    "Gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SHAPE, final_logit_softcapping=2.0)),
    "Gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_SHAPE)),
    "OLMo 2": lambda: Olmo2ForCausalLM(Olmo2Config(**_NO_HEAD_DIM)),
    "GPT-NeoX": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_NO_HEAD_DIM)),
}


def make(name: str):
    """Return a model whose norms have other weights than ones."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.2 * torch.rand(parameter.shape))
    return model
