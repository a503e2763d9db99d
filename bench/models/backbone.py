"""Backbones with random weights for speed measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from bench.models.quantized import QUANTIZED, fill_quantized


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
    "llama2-13b": Shape(
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
         "vocab_size": 32000},
        batch=4, length=1024, tokens=16384,
    ),
    "llama3-8b": Shape(  # grouped queries
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256},
        batch=4, length=1024, tokens=16384,
    ),
    "llama3-70b": Shape(  # more than one GPU holds in 16 bits: in 4 bits, or fewer layers
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8, "vocab_size": 128256},
        batch=1, length=1024, tokens=4096,
    ),
    "llama-3.2-1b": Shape(
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
        batch=4, length=1024, tokens=16384,
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


def backbone(shape: Shape, layers: int | None, device: torch.device, base: str = "bf16") -> PreTrainedModel:
    """Make a frozen Llama with random weights (normal, std 0.02).

    Args:
        shape: The sizes of the model.
        layers: Number of decoder layers, or None for all of the shape's.
        device: Device of the weights. On a GPU they are bfloat16, on other devices float32.
        base: "bf16", or a name in `bench.models.quantized.QUANTIZED`, for linear layers quantized by bitsandbytes.

    Raises:
        UserError: The quantization needs a package that is not installed.
    """
    settings = shape.config | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**settings, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config  # untyped there
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    if base in QUANTIZED:
        with torch.device("meta"):
            model = from_config(config, dtype=dtype)
        return fill_quantized(model, base, device, dtype).requires_grad_(False)
    with torch.device(device):
        return from_config(config, dtype=dtype).requires_grad_(False)


def save_backbone(shape: Shape, layers: int | None, device: torch.device, length: int, folder: Path) -> None:
    """Write a random backbone and a tokenizer of its vocabulary, for packages that load their models from a folder.

    Args:
        shape: The sizes of the model.
        layers: Number of decoder layers, or None for all of the shape's.
        device: Where the weights are drawn.
        length: Tokens that a sequence may have.
        folder: Folder to write to.
    """
    model = backbone(shape, layers, device)
    special = ["<unk>", "<s>", "</s>"]
    model.config.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    model.config.max_position_embeddings = max(length, model.config.max_position_embeddings)
    model.save_pretrained(folder)
    words = special + [f"w{number}" for number in range(len(special), model.config.vocab_size)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)
