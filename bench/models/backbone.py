"""Backbones with random weights for speed measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


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
    settings = shape.config | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**settings, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config  # untyped there
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return from_config(config, dtype=dtype).requires_grad_(False)
