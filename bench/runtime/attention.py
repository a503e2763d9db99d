"""Choose the attention masks and kernels of a model.

A mask of four dimensions replaces the one that transformers would make, in all layers. So a model whose layers have
sliding windows needs masks with these windows. A model with several kinds of layers takes a dictionary of masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers makes no mask for an attention function without a mask function of the same name. For its own "sdpa" it
# makes one whenever a CUDA graph is captured, needed or not, and a mask rules out the fastest attention kernels.
CAUSAL_SDPA = "malora_causal_sdpa"
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)

# Number of last tokens that a layer attends to, itself included, or None for all, by type of layer.
Windows = dict[str, int | None]
FULL, SLIDING = "full_attention", "sliding_attention"  # the names of transformers


def attention_windows(model: nn.Module) -> Windows:
    """Return the windows of a model's layers, as transformers itself reads them from the config.

    Raises:
        UserError: Some layers attend in another way, or the attention takes no explicit mask.
    """
    config = cast("PreTrainedModel", model).config.get_text_config()
    name, implementation = config.model_type, config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UserError(
            f"{name} runs with {implementation!r} attention, which takes no explicit mask; load it with 'sdpa'."
        )
    window = getattr(config, "sliding_window", None)
    if (types := getattr(config, "layer_types", None)) is None:
        types = [FULL if window is None else SLIDING]
        if window is None and getattr(config, "attention_chunk_size", None) is not None:
            types = ["chunked_attention"]
    if unknown := set(types) - {FULL, SLIDING}:
        raise UserError(
            f"{name} has layers of type {', '.join(sorted(unknown))}, for which this benchmark has no mask; "
            "choose a base model with full or sliding-window attention."
        )
    return {kind: window if kind == SLIDING else None for kind in sorted(set(types))}


def masks_for(windows: Windows, make: Callable[[int | None], Tensor]) -> Tensor | dict[str, Tensor]:
    """Make the masks that a model takes as `attention_mask`.

    Args:
        windows: Result of `attention_windows`.
        make: Makes the mask of a window.

    Returns:
        One mask if all layers are alike, because models of a single kind know no dictionary. Else masks by type.
    """
    if len(windows) == 1:
        return make(*windows.values())
    return {kind: make(window) for kind, window in windows.items()}


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
