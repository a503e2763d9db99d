"""Backbones of random weights for speed measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A backbone, and what one step on it is: `tokens` in micro-batches of `batch` sequences of `length`."""

    config: dict[str, Any]
    batch: int
    length: int
    tokens: int
    prompt: int = 128  # for decode
    new_tokens: int = 64


SHAPES: dict[str, Shape] = {
    "llama2-7b": Shape(
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "vocab_size": 32000},
        batch=4, length=1024, tokens=16384,  # the paper's tokens a step
    ),
    "smollm2-135m": Shape(
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
        batch=16, length=128, tokens=2048,
    ),
    "toy": Shape(
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 512},
        batch=4, length=64, tokens=512, prompt=16, new_tokens=8,  # under a second a step on two CPU cores
    ),
}  # fmt: skip


def backbone(shape: Shape, layers: int | None, device: torch.device) -> PreTrainedModel:
    """A frozen Llama of random weights (normal, std 0.02): bfloat16 on a GPU, float32 on a CPU."""
    settings = shape.config | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**settings, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
