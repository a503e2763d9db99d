"""Find, make or fetch base models, and load them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import malora
from bench.errors import UserError
from bench.models import tiny
from bench.models.cache import make_once
from bench.models.smollm2 import make_smollm2


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        path: Its folder.
        name: Its name in records.
        hash: SHA-256 of its weights, or its commit on the hub.
    """

    path: Path
    name: str
    hash: str


@cache
def prepare(model: str) -> BaseModel:
    """Find a base model; make or fetch it first if necessary.

    Args:
        model: A name in BUILT_IN, a folder, or an id on the Hugging Face hub.

    Raises:
        UserError: There is no such model, or its folder lacks a file.
    """
    if model in BUILT_IN:
        path = BUILT_IN[model]()
        return BaseModel(path, model, _hash_weights(path))
    path = Path(model)
    if path.is_dir():
        for what, pattern in (("weights", "*.safetensors"), ("config", "config.json"), ("tokenizer", "tokenizer*")):
            if not list(path.glob(pattern)):
                raise UserError(f"{path} has no {what} ({pattern}); --model takes what save_pretrained wrote.")
        return BaseModel(path, path.resolve().name, _hash_weights(path))
    return _fetch_from_hub(model)


def _fetch_from_hub(model: str) -> BaseModel:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "tokenizer*"])
    except Exception as error:  # the hub client passes on any exception of its HTTP client
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"--model {model!r} is no built-in ({', '.join(BUILT_IN)}), no folder here, and could not be fetched from "
            f"the Hugging Face hub ({type(error).__name__}: {first_line}); check the name, or give "
            "a folder that save_pretrained wrote."
        ) from error
    return BaseModel(Path(path), model, Path(path).name)


def load(base: BaseModel, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen base model and its tokenizer.

    The model is in bfloat16 on a GPU and in float32 on a CPU.

    Raises:
        UserError: The folder is not a complete causal language model.
    """
    disable_progress_bar: Callable[[], None] = transformers.utils.logging.disable_progress_bar  # untyped there
    disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{base.path} is not a complete causal language model: {error}") from error
    # PEFT writes this name into an adapter's config, and `load_adapter` checks it.
    model.config._name_or_path = model.name_or_path = f"{base.name}@{base.hash[:12]}"
    frozen = model.requires_grad_(False)
    return frozen.to(device), tokenizer  # type: ignore[arg-type]  # transformers wraps `to`, which hides its signature


def targets(base: BaseModel) -> list[str] | str:
    """Return the names of modules to adapt, or a regular expression.

    They are the paper's Q, K, V, Up, Down and Gate.

    Raises:
        UserError: The names are unknown for models of this type.
    """
    model_type = AutoConfig.from_pretrained(base.path).model_type
    if model_type not in malora.TARGET_MODULES:
        raise UserError(f"no targets are known for models of type {model_type!r}; add them in malora/targets.py.")
    return malora.TARGET_MODULES[model_type]


def _make_tiny() -> Path:
    return make_once(f"tiny-{tiny.recipe_hash()[:12]}", tiny.train_base)


BUILT_IN: dict[str, Callable[[], Path]] = {"tiny": _make_tiny, "smollm2-135m": make_smollm2}


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
