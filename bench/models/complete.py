"""Check that the weights, the config and the tokenizer of a base model fit together.

transformers sets weights that the files lack to random values, with a warning. It builds the model that a config
describes before it compares sizes, which may take all memory or hours. Each check here raises `IncompleteError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

# Far above all models there are. A layer takes milliseconds to build, and some configs have a list of its layers.
MAX_LAYERS = 1_000
MAX_EXPERTS = 10_000
LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "depth"}
EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts"}
# Values of the model per value in its files. Weights in 4 or 2 bits are packed, 16 of them in one 32-bit integer.
MAX_RATIO, MAX_RATIO_OF_PACKED = 2, 16
MAX_NAMES = 3  # of tensors in a message
PROBE = "a b"


class IncompleteError(ValueError):
    """The files of a base model contradict each other."""


def require_plausible_config(folder: Path, stored: int) -> None:
    """Check that a config describes a model of the size of its files, without memory for its weights.

    Args:
        folder: Folder of the model.
        stored: Number of values in its weight files.
    """
    raw, _ = PreTrainedConfig.get_config_dict(folder)
    for name, value in _integers(raw):
        for names, most in ((LAYERS, MAX_LAYERS), (EXPERTS, MAX_EXPERTS)):
            if name in names and value > most:
                raise IncompleteError(f"{name} of config.json is {_short(value)}, and at most {most:,} are read")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    from_config: Callable[..., nn.Module] = AutoModelForCausalLM.from_config  # untyped there
    with torch.device("meta"):
        model = from_config(config, trust_remote_code=False)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if described > (MAX_RATIO_OF_PACKED if "quantization_config" in raw else MAX_RATIO) * stored:
        raise IncompleteError(f"config.json describes {_short(described)} weights, and the files have {stored:,}")


def _integers(values: object) -> Iterator[tuple[str, int]]:
    """Return the integers of a config with their names, also nested ones."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if isinstance(value, int):
                yield name, value
            yield from _integers(value)
    elif isinstance(values, list):
        for value in values:
            yield from _integers(value)


def _short(value: int) -> str:
    return f"{value:,}" if value < 10**15 else f"above 10^{len(str(value)) - 1}" if value < 10**300 else "above 10^300"


def require_all_weights(missing: Iterable[str]) -> None:
    """Check that no tensor of the model is missing in its files.

    Args:
        missing: Names of the tensors that transformers has initialized.
    """
    names = sorted(missing)
    if names:
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        raise IncompleteError(f"the files have no {', '.join(names[:MAX_NAMES])}{more}, which config.json asks for")


def require_working_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that a tokenizer encodes and decodes, and that the model has an embedding for each of its words.

    Added tokens that no text here has may lie beyond the embeddings.

    Args:
        tokenizer: The tokenizer.
        rows: Number of embeddings.
    """
    ids = tokenizer([PROBE], add_special_tokens=False)["input_ids"][0]
    if not ids:
        raise IncompleteError(f"the tokenizer has no token for {PROBE!r}")
    tokenizer.decode(ids)
    tokenizer(PROBE, return_special_tokens_mask=True)
    for name in ("pad", "eos", "bos", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number >= rows:
            raise IncompleteError(f"the tokenizer's {name}_token is number {number:,}, and the model embeds {rows:,}")
    if len(tokenizer) > rows:
        added: Any = tokenizer.get_added_vocab()
        beyond = [token for token, number in tokenizer.get_vocab().items() if number >= rows and token not in added]
        if beyond:
            raise IncompleteError(f"the tokenizer has {len(tokenizer):,} tokens, and the model embeds {rows:,}")


@torch.no_grad()
def require_working_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a forward pass runs and that its logits are finite, on the model's device."""
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]], device=next(model.parameters()).device)
    if not model(input_ids=ids, use_cache=False).logits.isfinite().all():
        raise IncompleteError("its logits are not finite")
