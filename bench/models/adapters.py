"""Add adapters to base models, load them and count their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

import malora
from bench.errors import UserError


def add_adapter(model: PreTrainedModel, method: str, options: dict[str, Any], seed: int) -> PeftModel:
    """Add a new adapter to a base model.

    The base model's frozen layers are then optimized for speed.

    Args:
        model: The base model.
        method: A name in `malora.METHODS`.
        options: Options that override the method's own.
        seed: Seed of the adapter's initialization.

    Raises:
        UserError: The method does not fit the base model.
    """
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, malora.make_config(method, **options))
    except ValueError as error:
        raise UserError(f"{method} does not fit {model.name_or_path}: {error}") from error
    malora.optimize_backbone(adapted)
    return adapted


def check_adapter(folder: Path) -> None:
    """Check that a folder has an adapter.

    Raises:
        UserError: One of its files is missing.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; --adapter takes a folder that save_pretrained wrote.")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Add a saved adapter to a base model.

    Raises:
        UserError: The folder has no adapter, or one that was trained on another base model.
    """
    check_adapter(folder)
    try:
        trained_on = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path or ""
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'adapter_config.json'} is not a PEFT config ({error!r}); save it again.") from error
    if "@" in trained_on and trained_on != model.name_or_path:
        raise UserError(f"{folder} was trained on {trained_on}, not on {model.name_or_path}; give its base as --model.")
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except SafetensorError as error:
        raise UserError(f"{folder / 'adapter_model.safetensors'} is broken ({error}); save it again.") from error
    except (RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"{folder} does not fit {model.name_or_path}: it was trained on another base ({first_line}); give its base "
            "as --model."
        ) from error
    malora.optimize_backbone(adapted)
    return adapted


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Count parameters and bytes of a model with an adapter.

    Returns:
        "trainable": Number of trainable parameters.
        "total": Number of all parameters, including the base model.
        "adapter_bytes": Size of the adapter in bytes when saved, including its frozen factors.
    """
    trainable, total = model.get_nb_trainable_parameters()
    # Without this argument PEFT asks the hub if the embeddings were resized. They never are here.
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        "trainable": trainable,
        "total": total,
        "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in adapter.values()),
    }
