"""Dtypes, layouts and padded sizes that the fused path computes with."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matmuls over `x`.

    It is autocast's where autocast is on, else the dtype of `x`.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def flatten_tokens(x: Tensor) -> Tensor:
    """Return x [..., n] as matmuls read it: [T, n], contiguous, in `matmul_dtype`."""
    return x.to(matmul_dtype(x)).reshape(-1, x.shape[-1]).contiguous()


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def is_captured(like: Tensor) -> bool:
    """Return whether work on the tensor's device is being captured into a CUDA graph.

    Captured work has no values until the graph is replayed.
    """
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def cdiv(size: int, step: int) -> int:
    """Return size / step, rounded up.

    Triton's functions of these names wrap their results for use in kernels, which takes the host long.
    """
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (max(size, 1) - 1).bit_length()
