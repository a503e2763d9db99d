"""Add adapters to base models, load them and count their parameters."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

import malora
from bench.errors import UserError
from bench.models.base import BaseModel
from bench.models.patterns import PATTERN_FIELDS, require_fast_patterns
from bench.models.size import require_memory

BASE_FILE = "base_model.json"  # next to a saved adapter: name and hash of its base
FORMER_BASE = re.compile(r"@[0-9a-f]{12}$")
MAX_NAMES = 3  # of tensors in a message
MAX_DETAILS = 200  # characters of an error of PEFT, which can be a line per tensor


def add_adapter(model: PreTrainedModel, method: str, options: dict[str, Any], seed: int) -> PeftModel:
    """Add a new adapter to a base model.

    The base model's frozen layers are then optimized for speed.

    Args:
        model: The base model.
        method: A name in `malora.METHODS`.
        options: Options that override the method's own.
        seed: Seed of the adapter's initialization.

    Raises:
        UserError: The method does not fit the base model or the machine, or nothing of the adapter is trained.
    """
    torch.manual_seed(seed)
    try:
        config = malora.make_config(method, **options)
        if options.keys() & PATTERN_FIELDS:
            require_fast_patterns(config, model)
        require_memory(model, method, config)
        adapted = get_peft_model(model, config)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, re.error) as error:
        raise UserError(f"{method} does not fit {model.name_or_path}: {error}") from error
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise UserError(f"{method} with these options has nothing to train; leave out inference_mode.")
    _pad_weights(adapted)
    return adapted


def check_adapter(folder: Path) -> None:
    """Check that a folder has an adapter.

    Raises:
        UserError: One of its files is missing.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; --adapter takes a folder that save_pretrained wrote.")


def save_adapter(model: PeftModel, base: BaseModel, folder: Path) -> None:
    """Save an adapter, with the location of its base model, its commit on the hub, and its hash in `BASE_FILE`."""
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = base.location, base.commit
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / BASE_FILE).write_text(
        json.dumps({"name": base.name, "hash": base.hash}, indent=1) + "\n", encoding="utf-8"
    )


def load_adapter(model: PreTrainedModel, base: BaseModel, folder: Path) -> PeftModel:
    """Add a saved adapter to a base model.

    Args:
        model: The base model as `bench.models.base.load` returned it.
        base: Where it was loaded from.
        folder: Folder that `save_adapter`, or PEFT's save_pretrained, wrote.

    Raises:
        UserError: The folder has no adapter, an incomplete one, or one that was trained on another base model.
    """
    check_adapter(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT passes on any exception that a damaged config causes
        raise UserError(f"{folder / 'adapter_config.json'} is not a PEFT config ({error!r}); save it again.") from error
    if config.is_prompt_learning:
        raise UserError(f"{folder} has virtual tokens ({config.peft_type}), which cannot be scored here.")
    if getattr(config, "adapters", None):
        raise UserError(f"{folder} names other adapters for PEFT to read ({config.peft_type}); score them one by one.")
    if getattr(config, "megatron_config", None):
        raise UserError(f"{folder} names a module for PEFT to import (megatron_core), which could run any code.")
    _require_base(base, folder, str(config.base_model_name_or_path or ""))
    require_fast_patterns(config, model)
    adapted = _load_all_tensors(model, folder)
    _pad_weights(adapted)
    return adapted


def _pad_weights(model: PeftModel) -> None:
    """Let the fused backends move frozen weights, and let fp8 convert layers.

    Kernels for the other frozen layers are the business of training: it uses them where it captures CUDA graphs.
    """
    malora.optimize_backbone(model, rotary=False, activation=False, norm=False, loss=False)


def _require_base(base: BaseModel, folder: Path, trained_on: str) -> None:
    """Check that an adapter that names the hash of its base was trained on this one.

    Args:
        base: The base model.
        folder: Folder of the adapter.
        trained_on: The base in the adapter's config. Former versions wrote NAME@HASH.

    Raises:
        UserError: It was trained on another base.
    """
    here = f"{base.name} ({base.hash[:12]})"
    if (folder / BASE_FILE).is_file():
        try:
            content = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
            name, found = str(content["name"]), str(content["hash"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{folder / BASE_FILE} is broken ({error!r}); save the adapter again.") from error
        if found != base.hash:
            raise UserError(f"{folder} was trained on {name} ({found[:12]}), not on {here}; give its base as --model.")
    elif FORMER_BASE.search(trained_on) and trained_on != f"{base.name}@{base.former_hash[:12]}":
        raise UserError(f"{folder} was trained on {trained_on}, not on {here}; give its base as --model.")


def _load_all_tensors(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load an adapter, and check that model and file have the same finite tensors.

    PEFT warns of tensors that the file lacks and leaves them at their random start. It ignores those that the model
    lacks.

    Raises:
        UserError: They differ, or a tensor has values that are not finite.
    """
    weights = folder / "adapter_model.safetensors"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # reported below
            adapted = PeftModel.from_pretrained(model, folder)
            result = adapted.load_adapter(str(folder), "default")  # `from_pretrained` does not return its result
    except SafetensorError as error:
        raise UserError(f"{weights} is broken ({error}); save it again.") from error
    except KeyError as error:  # of a module that is saved as a whole
        raise UserError(f"{weights} lacks {''.join(map(str, error.args))}; save the adapter again.") from error
    except Exception as error:  # PEFT checks the sizes of tensors, but hardly a value of the config
        details = " ".join(str(error).split())[:MAX_DETAILS]
        raise UserError(
            f"{folder} does not fit {model.name_or_path}: it was trained on another base, or its config was changed "
            f"({details}); give its base as --model."
        ) from error
    missing, unexpected = result.missing_keys, result.unexpected_keys
    if missing or unexpected:
        problems = [f"lacks {len(missing)} tensors of the adapter ({_some(missing)})"] if missing else []
        problems += [f"has {len(unexpected)} that are none of it ({_some(unexpected)})"] if unexpected else []
        raise UserError(
            f"{weights} {' and '.join(problems)}; save it again, with save_pretrained of the model "
            "inside any wrapper (torch.compile, DDP)."
        )
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if broken := [name for name, tensor in loaded.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"{weights} has values that are not finite in {len(broken)} of {len(loaded)} tensors ({_some(broken)}); "
            "its training diverged, so train it again."
        )
    return adapted


def hash_adapter(model: nn.Module) -> str:
    """Return the hex sha256 of an adapter's tensors with their names; that of nothing for a model without one."""
    digest = hashlib.sha256()
    if isinstance(model, PeftModel):
        for name, tensor in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


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
