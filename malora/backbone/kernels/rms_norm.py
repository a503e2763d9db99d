"""RMSNorm in one kernel each way, for frozen norm weights.

    y = a · x ⊙ (w + o)        a = 1 / √(mean(x²) + eps)

and backward, with g = dy ⊙ (w + o):

    dx = a · (g - x · a² · mean(g ⊙ x))

The offset o is 1 in the Gemma models and 0 elsewhere. The backward pass saves x alone. The gradient of w takes most of
the time of a usual backward kernel, and nobody needs it when the norm is frozen.

| symbol | meaning | size |
| --- | --- | --- |
| n | size of what is normalized: the hidden size, or that of a head | |
| x, y | | [..., n] |
| w | weight of the norm, without a gradient | [n] |
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.backbone.recompute import note
from malora.fused.kernels.launch import launch
from malora.fused.tensor_utils import cdiv, next_power_of_2

_TILE = 2048  # elements per program, if rows are short: those of heads have 64 to 256


@triton.jit
def _rms_norm_kernel(
    x_ptr, w_ptr, y_ptr, rows, n, x_stride, EPS: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of y, which is contiguous. BLOCK is a power of two that covers n."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < n)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=column < n, other=0.0).to(tl.float32) + OFFSET
    scale = tl.rsqrt(tl.sum(x * x, 1) / n + EPS)[:, None]
    tl.store(y_ptr + row * n + column, x * scale * w, mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    x_ptr, w_ptr, dy_ptr, dx_ptr, rows, n, x_stride, dy_stride, EPS: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of dx, which is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < n)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=column < n, other=0.0).to(tl.float32) + OFFSET
    g = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32) * w
    scale = tl.rsqrt(tl.sum(x * x, 1) / n + EPS)[:, None]
    shared = (tl.sum(g * x, 1) / n)[:, None]
    tl.store(dx_ptr + row * n + column, scale * (g - x * (scale * scale * shared)), mask=mask)


def normalize(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return y [..., n], without a gradient."""
    n = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    matrix = _as_matrix(x)
    if rows := len(matrix):
        grid, options = _launch_options(rows, n)
        launch(_rms_norm_kernel, grid, matrix, weight, y, rows, n, matrix.stride(0), EPS=eps, OFFSET=offset, **options)
    return y


class _RmsNorm(torch.autograd.Function):
    """Compute (x, weight, eps, offset) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return normalize(x, weight, eps, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n = x.shape[-1]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x, dy = _as_matrix(x), _as_matrix(dy)
        if rows := len(x):
            grid, options = _launch_options(rows, n)
            launch(
                _rms_norm_backward_kernel,
                grid,
                x,
                weight,
                dy,
                dx,
                rows,
                n,
                x.stride(0),
                dy.stride(0),
                EPS=ctx.eps,
                OFFSET=ctx.offset,
                **options,
            )
        return dx, None, None, None


def _as_matrix(x: Tensor) -> Tensor:
    """Return a tensor [..., n] as a matrix whose rows are contiguous, and may have any stride."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _launch_options(rows: int, n: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid, and the tile of a program with its number of warps: one per 512 elements, at most 16."""
    block = next_power_of_2(n)
    rows_per_program = max(_TILE // block, 1)
    warps = min(max(rows_per_program * block // 512, 1), 16)
    return (cdiv(rows, rows_per_program),), {"ROWS": rows_per_program, "BLOCK": block, "num_warps": warps}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return the RMSNorm of x, differentiable with respect to x and not to the weight.

    Args:
        x: [..., n]. Heads may come as the view [B, heads, S, n] of [B, S, heads, n], and so does then y.
        weight: [n], frozen.
        eps: Added to the mean square.
        offset: Added to the weight.

    Returns:
        x / √(mean(x²) + eps) ⊙ (weight + offset), [..., n] in the dtype of x, computed in float32.
    """
    if x.dim() == 4 and x.stride(2) > x.stride(
        1
    ):  # the rows of a head are not next to each other, those of a token are
        return rms_norm(x.transpose(1, 2), weight, eps, offset).transpose(1, 2)
    y: Tensor = _RmsNorm.apply(x, weight, eps, offset)
    note(y, normalize, x, weight, eps, offset)
    return y
