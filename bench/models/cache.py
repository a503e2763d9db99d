"""The folder in which base models that were made here are kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    return Path(os.environ.get("MALORA_CACHE", Path.home() / ".cache" / "malora"))


def make_once(name: str, make: Callable[[Path], None]) -> Path:
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
