"""Dtypes and layouts that the fused path computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Autocast's where that is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def flat(x: Tensor) -> Tensor:
    """x [..., n] as products read it: [T, n], contiguous, in their dtype."""
    return x.to(dtype_of_products(x)).reshape(-1, x.shape[-1]).contiguous()


def is_captured(like: Tensor) -> bool:
    """Whether what runs now on the tensor's device becomes a CUDA graph: it has no values until that is replayed."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
