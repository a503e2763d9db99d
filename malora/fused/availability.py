"""Ask once whether Triton can run here, and warn once where it cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


logger = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton was told to run kernels without a GPU, slowly, to test them."""
    return has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def warn_once(backend: str, reason: str, instead: str) -> None:
    logger.warning("backend %r cannot compute %s; %s does.", backend, reason, instead)
