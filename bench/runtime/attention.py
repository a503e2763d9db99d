"""Which kernels a model's attention takes, by whether it needs a mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Without a mask function of that name transformers makes no mask. With its own "sdpa" it does while a CUDA graph is
# captured, whether needed or not, and a mask rules out the fastest attention kernels.
CAUSAL_SDPA = "malora_causal_sdpa"
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)


@contextmanager
def no_attention_mask(model: nn.Module) -> Iterator[None]:
    """Inside it attention is causal and knows no padding, which must stand to the right of all that is read."""
    config = model.config
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = CAUSAL_SDPA
    try:
        yield
    finally:
        config._attn_implementation = before


def exact_with_masks(device: torch.device) -> AbstractContextManager:
    """Inside it attention is that of the kernels which take a mask and whose gradient with it is right: cuDNN's can be
    NaN (PyTorch's issue 196678)."""
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()
