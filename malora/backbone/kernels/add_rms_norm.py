"""Residual sum and RMSNorm in one kernel each way, for frozen norm weights.

    s = x + residual        y = s / √(mean(s²) + eps) ⊙ w

and backward, with a = 1 / √(mean(s²) + eps) and g = dy ⊙ w:

    dx = dresidual = a · (g - s · a² · mean(g ⊙ s)) + ds

A decoder layer has two residual sums, and a norm follows each of them. Apart, each pair takes eleven passes over the
hidden states, forward and backward together; in one kernel it takes eight.

1. A program computes one row. The row stays in registers between the sum, the mean and the norm.
2. The norm is that of the sum as it was rounded to its dtype, as if it had been stored and read again.
3. The backward pass saves s alone, recomputes its norm, and adds the gradient ds that comes from later layers.

| symbol | meaning | size |
| --- | --- | --- |
| n | hidden size | |
| x, residual, s (sum), y | hidden states | [..., n] |
| w | weight of the norm, without a gradient | [n] |
| dy, ds (dsum) | gradients of y and s | [..., n] |

Liger's kernel of the same name also computes the gradient of w, which takes most of its time and which nobody needs
when the norm is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.backbone.kernels.rms_norm import normalize
from malora.backbone.recompute import note
from malora.fused.kernels.launch import launch
from malora.fused.tensor_utils import next_power_of_2


@triton.jit
def _add_rms_norm_kernel(x_ptr, residual_ptr, w_ptr, sum_ptr, y_ptr, n, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one row of s and y.

    All matrices are contiguous. BLOCK is a power of two that covers n.
    """
    row = tl.program_id(0).to(tl.int64) * n
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    x = tl.load(x_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
    total = (x + residual).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row + columns, total, mask=mask)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / n + EPS)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + columns, total * scale * w, mask=mask)


@triton.jit
def _add_rms_norm_backward_kernel(
    sum_ptr, w_ptr, dy_ptr, dsum_ptr, dx_ptr, n, dy_stride, dsum_stride,
    HAS_DSUM: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one row of dx.

    `*_stride` is the number of elements from one row to the next; dx and s are contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    total = tl.load(sum_ptr + row * n + columns, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dy *= tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / n + EPS)
    dx = scale * (dy - total * (scale * scale * tl.sum(dy * total, 0) / n))
    if HAS_DSUM:
        dx += tl.load(dsum_ptr + row * dsum_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * n + columns, dx, mask=mask)


class _AddRmsNorm(torch.autograd.Function):
    """Compute (x, residual, weight, eps) -> (s, y)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        total, y, n = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
        launch(_add_rms_norm_kernel, (x.numel() // n,), x, residual, weight, total, y, n, EPS=eps, **_launch_options(n))
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # only the sum was used
            return dsum, dsum, None, None
        total, weight = ctx.saved_tensors
        n = total.shape[-1]
        dy = _as_matrix(dy, n)
        dsum = None if dsum is None else _as_matrix(dsum, n)
        dx = torch.empty_like(total)
        launch(
            _add_rms_norm_backward_kernel, (len(dy),),
            total, weight, dy, dy if dsum is None else dsum, dx, n, dy.stride(0), 0 if dsum is None else dsum.stride(0),
            HAS_DSUM=dsum is not None, EPS=ctx.eps, **_launch_options(n),
        )  # fmt: skip
        return dx, dx, None, None


def _as_matrix(gradient: Tensor, n: int) -> Tensor:
    """Return a gradient [..., n] as a matrix whose rows are contiguous.

    The matrix can have any row stride.
    """
    matrix = gradient.reshape(-1, n)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _launch_options(n: int) -> dict[str, int]:
    """Return the block that covers a row, and the number of warps.

    There is one warp per 512 elements of the block, at most 16.
    """
    block = next_power_of_2(n)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + residual and its RMSNorm.

    Both are differentiable with respect to x and residual, not with respect to the weight.

    Args:
        x: [..., n].
        residual: [..., n], of the dtype of x.
        weight: [n], frozen.
        eps: Added to the mean square.

    Returns:
        s: x + residual, [..., n] in the dtype of x.
        y: s / √(mean(s²) + eps) ⊙ weight, in the same dtype, computed in float32 from the rounded s.
    """
    s, y = _AddRmsNorm.apply(x, residual, weight, eps)
    note(y, normalize, s, weight, eps)
    return s, y
