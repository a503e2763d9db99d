"""Find, make or fetch base models, and load them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import malora
from bench.errors import UserError
from bench.models.complete import (
    IncompleteError,
    require_all_weights,
    require_plausible_config,
    require_working_model,
    require_working_tokenizer,
)
from bench.models.smollm2 import make_smollm2

WEIGHTS = "*.safetensors"  # the only format that is loaded
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the second names the files of sharded weights
CHUNK = 16 << 20  # bytes read at a time
MAX_DETAILS = 400  # characters of an error of transformers, which can be a line per tensor
SECONDS_PER_UPDATE = 5.0  # of a bar, and before it is shown at all
# Files that transformers reads for a config or a tokenizer. A generation config is not among them: decoding is ours.
LOADED_FILES = (
    "config.json", "config.*.json", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "*_vocab.json", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.spm",
    "*.codes", "*.tokenizer", "dict.txt", "emoji.json", "byte_maps.json",
)  # fmt: skip
ADAPTER_CONFIG = "adapter_config.json"  # with it, transformers adds an adapter, or loads another model
# Keys that say what wrote a file, and the template of chats, which no prompt here uses.
IGNORED_KEYS = {
    "transformers_version", "_name_or_path", "name_or_path", "is_local", "local_files_only", "chat_template",
}  # fmt: skip
# The base of the tiny profile is in the repository, because its recipe gives other weights on other processors.
# `python -m bench.models.make_tiny` makes it again.
TINY_FOLDER = Path(__file__).with_name("tiny-base")
TINY_WEIGHTS = "2554d0b4783b8e27069ed16521dd5dc9069f71965a2c5a4d92ab0751cae143c6"  # SHA-256
TINY_FILES = "152477ed37792c8815d682c96d2a6781cd66343fadaf9469b06aaf6285d67462"  # `hash_files`
# `hash_files` of what the recipes of the built-in models make. Published records name these models by the hash of their
# weights, so that hash stays their identity. Versions of transformers write the same tokenizer of SmolLM2 differently.
RECIPE_FILES = {
    TINY_FILES: "tiny",
    "af2196cd0768b8b07ae02c0df42c4ec49a0a9fe2a9b0226dd32d5f523010ddca": "smollm2-135m, by transformers 5.17",
    "e2e8e1f52e80d271cfa5be62ec9938e176aba50aa3b282ddccc27fa5d9728397": "smollm2-135m, by transformers 5.24",
}


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        path: Its folder.
        name: Its name in records.
        hash: Its identity in records: SHA-256 of everything in the folder that decides a score, or its commit on the
            hub.
        former_hash: The identity of versions that read the weights alone; adapters of that time name it.
        commit: Its commit on the hub; None for a folder.
    """

    path: Path
    name: str
    hash: str
    former_hash: str
    commit: str | None = None

    @property
    def location(self) -> str:
        """What `from_pretrained` of transformers takes: an id on the hub, or an absolute path."""
        return str(self.path.resolve()) if self.commit is None else self.name


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
        return BaseModel(path, model, *_hashes(path))
    path = Path(model)
    if path.is_dir():
        for what, pattern in (("weights", "*.safetensors"), ("config", "config.json"), ("tokenizer", "tokenizer*")):
            if not list(path.glob(pattern)):
                raise UserError(f"{path} has no {what} ({pattern}); --model takes what save_pretrained wrote.")
        _require_no_adapter(path)
        loaded_weights(path)
        return BaseModel(path, path.resolve().name, *_hashes(path))
    return _fetch_from_hub(model)


def _fetch_from_hub(model: str) -> BaseModel:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(model, allow_patterns=[WEIGHTS, *LOADED_FILES, ADAPTER_CONFIG])
    except Exception as error:  # the hub client passes on any exception of its HTTP client
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"--model {model!r} is no built-in ({', '.join(BUILT_IN)}), no folder here, and could not be fetched from "
            f"the Hugging Face hub ({type(error).__name__}: {first_line}); check the name, or give "
            "a folder that save_pretrained wrote."
        ) from error
    _require_no_adapter(Path(path))
    commit = Path(path).name
    return BaseModel(Path(path), model, commit, former_hash=commit, commit=commit)


def _require_no_adapter(folder: Path) -> None:
    """Check that transformers loads the model of this folder, and no adapter with it.

    Raises:
        UserError: It has an adapter.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{folder} has an adapter ({ADAPTER_CONFIG}), which would be loaded with the model; give its base as "
            "--model, or merge the adapter and save the model."
        )


def loaded_weights(folder: Path) -> list[Path]:
    """Return the files of a folder that transformers loads weights from.

    The config may name a file, then comes `ONE_FILE`, and last the files that `INDEX` names. The identity of a base
    covers the safetensors files that lie directly in its folder, so all of them must be among these.

    Raises:
        UserError: A file is missing, or is not one of these.
    """
    config = _read_object(folder / "config.json")
    if "configuration_files" in config:  # names of other configs, by version of transformers
        try:
            config, _ = PreTrainedConfig.get_config_dict(folder)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{folder} has no config that can be loaded ({error}); save the model again.") from error
    named = config.get("transformers_weights")
    first = str(named or (ONE_FILE if (folder / ONE_FILE).is_file() else INDEX))
    source, names = "config.json", [first]
    if first.endswith(".index.json"):
        _require_beside(folder, source, first)
        weight_map = _read_object(folder / first).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / first} names no weights; save the model again.")
        source, names = first, sorted({str(name) for name in weight_map.values()})
    for name in names:
        _require_beside(folder, source, name)
        if not name.endswith(".safetensors"):
            raise UserError(f"{folder / source} names {name}, but only safetensors are loaded; save the model again.")
    return [folder / name for name in names]


def _require_beside(folder: Path, source: str, name: str) -> None:
    """Check that a file that another one names lies in the same folder."""
    if Path(name).name != name or not (folder / name).is_file():
        raise UserError(
            f"{folder / name} is no file directly in {folder} ({source} asks for it); "
            "restore it, or save the model again with save_pretrained."
        )


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON object ({error}); save the model again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; save the model again.")
    return content


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
        require_plausible_config(base.path, count_weights(base))
        options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype, **options)
        model, found = loaded
        require_all_weights(found["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
        require_working_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
    except UserError:
        raise
    except Exception as error:  # transformers passes on any exception that a damaged config or tokenizer causes
        raise _incomplete(base, error) from error
    model.config._name_or_path = model.name_or_path = base.location  # PEFT writes it into an adapter's config
    frozen: PreTrainedModel = model.requires_grad_(False).to(device)
    try:
        require_working_model(frozen, tokenizer)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any layer
        raise _incomplete(base, error) from error
    return frozen, tokenizer


def _incomplete(base: BaseModel, error: Exception) -> UserError:
    """Return the error for a base model that transformers cannot load."""
    kind = "" if isinstance(error, IncompleteError) else f"{type(error).__name__}: "
    details = " ".join(f"{kind}{error}".split())[:MAX_DETAILS]
    return UserError(f"{base.path} is not a complete causal language model ({details}); save or fetch it again.")


def count_weights(base: BaseModel) -> int:
    """Count the weights in a base model's files, which are not loaded.

    Raises:
        UserError: A file is broken.
    """
    count = 0
    for path in loaded_weights(base.path):
        try:
            with safe_open(path, framework="pt") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{base.path} is not a complete causal language model: {path.name}: {error}") from error
    return count


def targets(base: BaseModel) -> list[str] | str:
    """Return the names of modules to adapt, or a regular expression.

    They are the paper's Q, K, V, Up, Down and Gate.

    Raises:
        UserError: The names are unknown for models of this type.
    """
    try:
        model_type = AutoConfig.from_pretrained(base.path, trust_remote_code=False).model_type
    except Exception as error:  # as in `load`
        raise _incomplete(base, error) from error
    if model_type not in malora.TARGET_MODULES:
        raise UserError(f"no targets are known for models of type {model_type!r}; add them in malora/targets.py.")
    return malora.TARGET_MODULES[model_type]


def _find_tiny() -> Path:
    """Return the folder of the base of the tiny profile.

    Raises:
        UserError: A file is missing, or is not the one that published records were made with.
    """
    if (_hash_weights(TINY_FOLDER), hash_files(TINY_FOLDER)) != (TINY_WEIGHTS, TINY_FILES):
        raise UserError(
            f"{TINY_FOLDER} is not the tiny base of published records: a file is missing or changed; restore it with "
            "`git checkout`, or give a base of your own as --model."
        )
    return TINY_FOLDER


BUILT_IN: dict[str, Callable[[], Path]] = {"tiny": _find_tiny, "smollm2-135m": make_smollm2}


def _hashes(folder: Path) -> tuple[str, str]:
    """Return the hash of a base model, and the hash of its weights alone."""
    weights, files = _hash_weights(folder), hash_files(folder)
    if files in RECIPE_FILES:
        return weights, weights
    return hashlib.sha256(f"{weights} {files}".encode()).hexdigest(), weights


def _hash_weights(folder: Path) -> str:
    """Return the hash of all weights. It shows its progress, because those of a 7B model take many seconds."""
    digest = hashlib.sha256()
    paths = sorted(path for path in folder.glob(WEIGHTS) if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "mininterval": SECONDS_PER_UPDATE, "leave": False}
    with tqdm(total=total, desc=f"hash of {folder.name}", delay=SECONDS_PER_UPDATE, **options) as bar:
        for path in paths:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()


def hash_files(folder: Path) -> str:
    """Return the hash of the files next to the weights that decide what is loaded: config and tokenizer.

    Raises:
        UserError: A config is not a JSON object.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in LOADED_FILES for path in folder.glob(pattern) if path.is_file()}):
        if path.name in ("config.json", "tokenizer_config.json"):
            fields = {key: value for key, value in _read_object(path).items() if key not in IGNORED_KEYS}
            content = json.dumps(fields, sort_keys=True).encode()
        else:
            content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()
