"""Ask once whether Triton can run here, and warn once where it cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

logger = logging.getLogger(__name__)


# Found once, because torch.compile cannot trace a search for modules.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return _HAS_TRITON


def interprets_triton() -> bool:
    """Return whether Triton's interpreter runs kernels without a GPU.

    It does so slowly, to test them.
    """
    return has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def warn_once(backend: str, reason: str, instead: str) -> None:
    """Log that a backend cannot compute something, and its replacement.

    Log each message once per process.
    """
    logger.warning("backend %r cannot compute %s; %s does.", backend, reason, instead)
