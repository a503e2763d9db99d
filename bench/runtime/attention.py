"""Choose the attention kernels of a model, with and without masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers makes no mask for an attention function without a mask function of the same name. For its own "sdpa" it
# makes one whenever a CUDA graph is captured, needed or not, and a mask rules out the fastest attention kernels.
CAUSAL_SDPA = "malora_causal_sdpa"
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)


@contextmanager
def no_attention_mask(model: nn.Module) -> Iterator[None]:
    """Use causal attention without a mask inside the `with` block.

    Padding is not masked, so it must stand to the right of all tokens whose outputs are used.
    """
    config = cast("PreTrainedModel", model).config  # PEFT's models pass this on to their base model
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = CAUSAL_SDPA
    try:
        yield
    finally:
        config._attn_implementation = before


def exact_with_masks(device: torch.device) -> AbstractContextManager[None]:
    """Use only attention kernels with correct gradients under a mask inside `with`.

    On a GPU this excludes cuDNN, whose gradients with a mask can be NaN (PyTorch issue 196678).
    """
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()
