"""Note how outputs of frozen functions can be computed again from their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def note(output: Tensor, function: Callable[..., Tensor], *inputs: Any) -> None:
    """Note that `function(*inputs)` computes `output` again. Does nothing unless something listens."""
