"""Choose the attention masks and kernels of a model.

A mask of four dimensions replaces the one that transformers would make, in all layers. So a model whose layers have
sliding windows needs masks with these windows. A model with several kinds of layers takes a dictionary of masks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Root mean square by which logits of packed examples may differ, in standard deviations. Rounding gives about 1e-6 in
# float32 and 1e-2 in 16 bits, and examples that see each other about 1.
MAX_PACKING_ERROR, MAX_PACKING_ERROR_16_BIT = 1e-3, 0.1

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


def packed_attention_bias(example: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return the additive attention mask of packed sequences, [R, 1, C, C].

    It is 0 where a token may attend, that is to itself and to earlier tokens of its own example, and -inf elsewhere.
    Padding attends to padding, because attention over nothing is NaN.

    Args:
        example: Number of each token's example, 0 for padding, [R, C].
        dtype: Type of the mask.
        window: Number of last tokens that a token may attend to, itself included; None for all.
    """
    causal = torch.ones((example.shape[-1], example.shape[-1]), dtype=torch.bool, device=example.device).tril()
    if window is not None:
        causal = causal.triu(1 - window)
    visible = causal & (example[:, :, None] == example[:, None, :])
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))[:, None]


@torch.no_grad()
def require_packing(model: PreTrainedModel) -> None:
    """Check on two short texts that a packed sequence gives the logits of its examples one by one.

    Some types of models ignore explicit masks or positions, are not causal, or have a state beside attention.

    Args:
        model: A causal language model in eval mode, with its weights.

    Raises:
        UserError: The logits differ, or the model cannot run a packed sequence.
    """
    windows = attention_windows(model)
    device, dtype = model.device, model.dtype
    vocabulary = model.config.get_text_config().vocab_size
    lengths = (7, 5)
    texts = torch.randint(3, vocabulary, (1, sum(lengths)), generator=torch.Generator().manual_seed(0)).to(device)
    plain = torch.cat([model(input_ids=text).logits[0] for text in texts.split(lengths, 1)]).float()
    example = torch.tensor([[number for number, n in enumerate(lengths, 1) for _ in range(n)]], device=device)
    position = torch.tensor([[place for n in lengths for place in range(n)]], device=device)
    try:
        with exact_with_masks(device):
            packed = model(
                input_ids=texts,
                position_ids=position,
                attention_mask=masks_for(windows, partial(packed_attention_bias, example, dtype)),
                use_cache=False,
            ).logits[0]
        error = ((packed.float() - plain).square().mean().sqrt() / plain.std()).item()
        reason = f"their logits differ by {error:.2g} standard deviations"
    except (IndexError, RuntimeError, TypeError, ValueError) as failure:
        error, reason = float("inf"), f"{type(failure).__name__}: {failure}".partition("\n")[0]
    if not error <= (MAX_PACKING_ERROR if dtype == torch.float32 else MAX_PACKING_ERROR_16_BIT):
        raise UserError(
            f"models of type {model.config.model_type!r} cannot be used here, because training packs several examples "
            f"into a sequence, and this model does not keep them apart ({reason}); choose another base model."
        )


def exact_with_masks(device: torch.device) -> AbstractContextManager[None]:
    """Use only attention kernels with correct gradients under a mask inside `with`.

    On a GPU this excludes cuDNN, whose gradients with a mask can be NaN (PyTorch issue 196678).
    """
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()
