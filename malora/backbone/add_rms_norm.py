"""A residual sum and the norm of it as one Triton kernel each way, for frozen RMSNorms.

A decoder layer has two residual sums, each followed by a norm: the second by the next layer's. Apart, each pair passes
over the hidden states eleven times forward and backward, in kernels that do nothing else; together, eight times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _forward_kernel(x_ptr, residual_ptr, w_ptr, sum_ptr, y_ptr, n, y_stride, EPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * n
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    total = (x + residual).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row + columns, total, mask=inside)
    total = total.to(tl.float32)  # the norm is of what is stored, as if it had been read again
    scale = tl.rsqrt(tl.sum(total * total, 0) / n + EPS)
    w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * y_stride + columns, total * scale * w, mask=inside)


@triton.jit
def _backward_kernel(
    sum_ptr, w_ptr, dy_ptr, dsum_ptr, dx_ptr, n, dy_stride, dsum_stride,
    HAS_DSUM: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    total = tl.load(sum_ptr + row * n + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    dy *= tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / n + EPS)
    dx = scale * (dy - total * (scale * scale * tl.sum(dy * total, 0) / n))
    if HAS_DSUM:
        dx += tl.load(dsum_ptr + row * dsum_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * n + columns, dx, mask=inside)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: tuple[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        total, n = torch.empty_like(x), x.shape[-1]
        y = torch.empty_like(x) if out[0] is None else out[0]
        _forward_kernel[(x.numel() // n,)](
            x, residual, weight, total, y, n, y.stride(-2) if y.dim() > 1 else n, EPS=eps, **_launch(n)
        )
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # nobody used the norm
            return dsum, dsum, None, None, None
        total, weight = ctx.saved_tensors
        n = total.shape[-1]
        dy = _rows(dy, n)
        dsum = None if dsum is None else _rows(dsum, n)
        dx = torch.empty_like(total)
        _backward_kernel[(len(dy),)](
            total, weight, dy, dy if dsum is None else dsum, dx, n, dy.stride(0), 0 if dsum is None else dsum.stride(0),
            HAS_DSUM=dsum is not None, EPS=ctx.eps, **_launch(n),
        )  # fmt: skip
        return dx, dx, None, None, None


def _rows(gradient: Tensor, n: int) -> Tensor:
    """[..., n] as [T, n] whose rows lie anywhere, each in one piece."""
    rows = gradient.reshape(-1, n)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(n: int) -> dict[str, int]:
    block = triton.next_power_of_2(n)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s = x + residual, of [..., n] each, and its RMSNorm s / √(mean(s²) + eps) · weight, with a frozen weight [n].

    Both inputs have one dtype, the sum's and the norm's; what is between is in float32, and the norm is that of the
    rounded sum. The weight gets no gradient. The norm is written to `out`, if that is given, whose rows are equally far
    apart.
    """
    return _AddNorm.apply(x, residual, weight, eps, (out,))  # of an argument that is a tensor it would give a view
