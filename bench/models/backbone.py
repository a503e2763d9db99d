"""Backbones with random weights for speed measurements, and the size of adapters on them.

Symbol  Meaning
n       inputs of a linear layer
m       outputs of a linear layer
N       experts
r       rank of an expert
d       rank of the shared subspace
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import malora


@dataclass(frozen=True)
class Shape:
    """A backbone and the size of one step on it.

    Attributes:
        config: Arguments of `LlamaConfig`.
        batch: Sequences per micro-batch.
        length: Tokens per sequence.
        tokens: Tokens per training step, over all its micro-batches.
        prompt: Tokens of the prompt in decoding.
        new_tokens: Tokens to generate in decoding.
    """

    config: dict[str, Any]
    batch: int
    length: int
    tokens: int
    prompt: int = 128
    new_tokens: int = 64


SHAPES: dict[str, Shape] = {
    "llama2-7b": Shape(
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "vocab_size": 32000},
        batch=4, length=1024, tokens=16384,  # the paper's tokens per step
    ),
    "smollm2-135m": Shape(
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
        batch=16, length=128, tokens=2048,
    ),
    "toy": Shape(
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 512},
        batch=4, length=64, tokens=512, prompt=16, new_tokens=8,  # under a second per step on two CPU cores
    ),
}  # fmt: skip


def backbone(shape: Shape, layers: int | None, device: torch.device) -> PreTrainedModel:
    """Make a frozen Llama with random weights (normal, std 0.02).

    Args:
        shape: The sizes of the model.
        layers: Number of decoder layers, or None for all of the shape's.
        device: Device of the weights. On a GPU they are bfloat16, on other devices float32.
    """
    config = _llama_config(shape, layers)
    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config  # untyped there
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return from_config(config, dtype=dtype).requires_grad_(False)


def _llama_config(shape: Shape, layers: int | None = None) -> LlamaConfig:
    settings = shape.config | ({"num_hidden_layers": layers} if layers else {})
    return LlamaConfig(**settings, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def count_adapter_parameters(shape: Shape, config: PeftConfig, *, routers: bool = True) -> int:
    """Count the trainable parameters of an adapter from its sizes, without building a model.

    Args:
        shape: The backbone.
        config: The adapter, for example `malora.METHODS["malora"]()`.
        routers: Include the routers. The paper's parameter counts leave them out.

    Raises:
        ValueError: The adapter has an option that this function cannot count.
    """
    llama = _llama_config(shape)
    sizes = _linear_sizes(llama)
    per_layer = sum(_count_on_linear(config, *sizes[name], routers) for name in _target_names(config, sizes))
    return llama.num_hidden_layers * per_layer


def _linear_sizes(llama: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return (n, m) of the linear layers in a decoder layer that the paper adapts."""
    hidden, intermediate = llama.hidden_size, llama.intermediate_size
    head_size = llama.head_dim or hidden // llama.num_attention_heads
    key_value_heads = llama.num_key_value_heads or llama.num_attention_heads
    return {
        "q_proj": (hidden, llama.num_attention_heads * head_size),
        "k_proj": (hidden, key_value_heads * head_size),
        "v_proj": (hidden, key_value_heads * head_size),
        "up_proj": (hidden, intermediate),
        "gate_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }


# Options that adapt more or fewer parameters than the targets in every layer. Both PEFT's LoRA and malora have them.
_UNCOUNTED_OPTIONS = ("layers_to_transform", "exclude_modules", "modules_to_save")


def _target_names(config: PeftConfig, sizes: dict[str, tuple[int, int]]) -> list[str]:
    targets = getattr(config, "target_modules", None) or malora.TARGET_MODULES["llama"]
    if isinstance(targets, str) or set(targets) - set(sizes):
        raise ValueError(f"target_modules={targets!r} cannot be counted; choose from {', '.join(sizes)}.")
    for option in _UNCOUNTED_OPTIONS:
        if value := getattr(config, option, None):
            raise ValueError(f"{option}={value!r} cannot be counted; leave it out, or count the built model.")
    return sorted(targets)


def _count_on_linear(config: PeftConfig, n: int, m: int, routers: bool) -> int:
    """Count the trainable parameters of an adapter on a linear layer with n inputs and m outputs."""
    if isinstance(config, malora.MaloraConfig):
        return _count_malora(config, n, m, routers)
    if isinstance(config, LoraConfig):
        return config.r * (n + m) + (m if config.use_dora else 0)  # DoRA also trains a magnitude per output
    raise ValueError(f"a {type(config).__name__} cannot be counted; add its formula to bench/models/backbone.py.")


def _count_malora(config: malora.MaloraConfig, n: int, m: int, routers: bool) -> int:
    N, r, d = config.num_experts, config.r, config.d or 0
    if config.down == "A_t":
        counts = {"A": N * r * n}
    else:  # a subspace of d dimensions, shared by all experts or divided among them
        counts = {"P": N * r * (d if config.down == "P_t S" else d // N), "S": d * n}
    counts |= {"B": N * r * m} if config.up == "B_t" else {"Q": N * r * d, "S_B": d * m}
    if routers and config.has_router:
        counts["router"] = N * n
    return sum(count for name, count in counts.items() if name not in config.freeze)
