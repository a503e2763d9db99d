"""Causal attention without a mask, where a mask would change nothing.

While a CUDA graph is captured, transformers cannot read a mask or positions. So it makes a mask in every case, and a
mask rules out the fastest attention kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# transformers makes no mask for an attention function without a mask function of the same name.
CAUSAL_SDPA = "malora_causal_sdpa"
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)


@contextmanager
def no_attention_mask(model: nn.Module) -> Iterator[None]:
    """Use causal attention without a mask inside the `with` block.

    Padding is not masked, so it must stand to the right of all tokens whose outputs are used. Models that do not run
    with "sdpa" attention stay as they are. Layers with a sliding window would see too much.
    """
    config: Any = model.config  # PEFT's models pass this on to their base model
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = CAUSAL_SDPA
    try:
        yield
    finally:
        config._attn_implementation = before


def without_needless_mask(model: nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Return `no_attention_mask(model)` where it computes the same, else a context that does nothing.

    Args:
        model: A model of transformers, alone or in a PEFT model.
        inputs: Arguments of its `forward`. With an `attention_mask`, or with `position_ids`, which may say that a
            sequence is packed, transformers makes the mask.
    """
    needs_mask = inputs.get("attention_mask") is not None or inputs.get("position_ids") is not None
    return nullcontext() if needs_mask or not _is_causal_only(model) else no_attention_mask(model)


def _is_causal_only(model: nn.Module) -> bool:
    """Return whether all layers of a decoder attend to all earlier tokens, by SDPA."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or getattr(config, "is_encoder_decoder", False):
        return False
    text = config.get_text_config()
    restricted = ("sliding_window", "attention_chunk_size", "use_bidirectional_attention")
    is_plain = text is config and not any(getattr(text, name, None) for name in restricted)
    return is_plain and set(getattr(text, "layer_types", None) or ()) <= {"full_attention"}
