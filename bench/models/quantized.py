"""Random weights for a quantized backbone, made layer by layer: a 70B model does not fit into a GPU in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from bench.errors import UserError

# Quantizations of bitsandbytes, with the settings of QLoRA for 4 bits: double quantization, products in bfloat16.
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
STD = 0.02  # of the weights, as transformers draws them


def fill_quantized(model: PreTrainedModel, base: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Fill a Llama on the meta device with random weights, and quantize the linear layers of its decoder.

    The output head is not quantized, as transformers leaves it.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"--base {base} needs bitsandbytes, which is not installed.") from error
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                weight = torch.empty(child.weight.shape, device=device, dtype=dtype).normal_(std=STD)
                setattr(parent, name, _quantized_linear(bitsandbytes, weight, base))
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.ones(parameter.shape, device=device, dtype=dtype)
                if parameter.dim() > 1:
                    value.normal_(std=STD)
                owner._parameters[name] = nn.Parameter(value)
    model.tie_weights()  # the loop above has untied them
    _fill_buffers(model, device)
    four_bits = base == "nf4"
    flags = {"is_loaded_in_4bit": four_bits, "is_loaded_in_8bit": not four_bits, "is_quantized": True}
    for flag, is_set in flags.items():
        setattr(model, flag, is_set)  # PEFT reads these
    model.config.quantization_config = BitsAndBytesConfig(**QUANTIZED[base])
    return model


def _quantized_linear(bitsandbytes: Any, weight: torch.Tensor, base: str) -> nn.Module:
    """Return a linear layer of bitsandbytes with a weight [m, n] on a GPU or on the CPU."""
    m, n = weight.shape
    layers, device = bitsandbytes.nn, weight.device
    linear: nn.Module
    if base == "nf4":
        linear = layers.Linear4bit(
            n, m, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True, device="meta"
        )
        linear.weight = layers.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
        ).to(device)  # which quantizes
    else:
        linear = layers.Linear8bitLt(n, m, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        linear.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    return linear


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the frequencies of the rotary embedding anew. They are the only buffers of a Llama."""
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
