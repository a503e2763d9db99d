"""The cache folder of base models that are made here.

It is `$MALORA_CACHE`, or `~/.cache/malora`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder, which may not exist yet."""
    return Path(os.environ.get("MALORA_CACHE", Path.home() / ".cache" / "malora"))


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; make it first if it is missing.

    The folder is filled under a temporary name and then renamed, so an interrupted run leaves nothing incomplete.

    Args:
        name: Name of the folder. It should contain a hash of everything that `make` depends on.
        make: Writes the files into an empty folder.
    """
    folder = cache_folder() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
            made = Path(temporary) / name
            made.mkdir()
            make(made)
            try:
                made.rename(folder)
            except OSError:  # another process finished first, with the same files
                if not folder.is_dir():
                    raise
    return folder
