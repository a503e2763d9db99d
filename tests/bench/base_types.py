"""Small base models of many types: what the benchmark can train, and what it must refuse."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "pad_token_id": 0,
}
# Options that a type needs, because its own sizes would not fit or would make it large.
FITTING: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 8} for kind in ("gemma", "gemma2", "gemma3_text", "qwen3")},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "dropout": 0.0},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"bos_token_id": 1, "eos_token_id": 2},
    "gptj": {"rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2},
    "mamba": {"state_size": 4},
}
WITHOUT_KEY_VALUE_HEADS = ("opt", "gpt_neox", "gpt2", "bert", "roberta", "bloom", "gptj", "mamba")
WINDOW = 4
MIXED = ["sliding_attention", "full_attention"]
# Types whose windows are shorter than the texts: all layers, every other layer, or as the config says.
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "phi3": ("phi3", {}),
    "starcoder2": ("starcoder2", {}),
    "qwen2, one layer": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2, all layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    "smollm3": ("smollm3", {"use_sliding_window": True, "layer_types": MIXED}),
    "gemma2": ("gemma2", {"layer_types": MIXED}),
    "gemma3_text": ("gemma3_text", {"layer_types": MIXED}),
    "olmo3": ("olmo3", {"layer_types": MIXED}),
}
TYPES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("smollm3", "olmo2", "phi3", "gpt_neox", "opt", "gpt2", "gptj"),
)
UNFIT = ("bert", "roberta", "bloom", "mamba")
ALL: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in TYPES} | {
    f"{name}, window {WINDOW}": (kind, options | {"sliding_window": WINDOW})
    for name, (kind, options) in WINDOWED.items()
}


def make_base(name, **more):
    """Make a frozen model of random weights, with its own choice of attention, in eval mode."""
    kind, options = ALL.get(name, (name, {}))
    sizes = SIZES | ({"num_key_value_heads": 2} if kind not in WITHOUT_KEY_VALUE_HEADS else {})
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(sizes | FITTING.get(kind, {}) | options | more))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # so that attention is not even, and greedy texts do not repeat one token
    return model
