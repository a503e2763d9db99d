"""Rotary position embedding of queries and keys in one kernel each way.

Each head [x1, x2] of two halves becomes

    y1 = x1 ⊙ c1 - x2 ⊙ s1        y2 = x2 ⊙ c2 + x1 ⊙ s2

with the halves c1, c2 of the cosines and s1, s2 of the sines of its position. The gradient is the transposed rotation:
the same formula with -s2 in place of s1 and -s1 in place of s2.

1. A program rotates all heads of one token, so it loads the token's angles once.
2. Heads may be views of any strides, such as [B, heads, S, D] of [B, S, heads, D], or columns of one matrix for Q, K
   and V. Outputs have the order of strides of their inputs, as those of torch's elementwise operations.
3. If there are fewer angles than D, the columns after them are copied.

| symbol | meaning | size |
| --- | --- | --- |
| B, S | sequences, tokens per sequence | |
| D, R | size of a head, and of the part of it that is rotated | R ≤ D |
| q, k | | [B, heads, S, D], each with its own number of heads |
| cos, sin | | [B or 1, S, R] |
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.fused.kernels.launch import launch
from malora.fused.tensor_utils import next_power_of_2


@triton.jit
def _rotate(
    x_ptr, y_ptr, x_stride, y_stride, c1, s1, c2, s2, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of a token. The pointers are those of the first head, the strides those from head to head."""
    head = tl.arange(0, HEAD_BLOCK)[:, None].to(tl.int64)  # heads may be as far apart as whole sequences
    column = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < HEADS) & (column < HALF)
    x_at, y_at = x_ptr + head * x_stride + column, y_ptr + head * y_stride + column
    x1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_at, x1 * c1 - x2 * s1, mask=mask)
    tl.store(y_at + HALF, x2 * c2 + x1 * s2, mask=mask)
    if REST_BLOCK > 0:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        mask = (head < HEADS) & (rest < D)
        tl.store(y_ptr + head * y_stride + rest, tl.load(x_ptr + head * x_stride + rest, mask=mask), mask=mask)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, S,
    q_batch, q_head, q_token, k_batch, k_head, k_token, yq_batch, yq_head, yq_token, yk_batch, yk_head, yk_token,
    cos_batch, cos_token, sin_batch, sin_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of one token of one sequence. `*_batch`, `*_head`, `*_token` are strides."""
    token = (tl.program_id(0) % S).to(tl.int64)
    batch = (tl.program_id(0) // S).to(tl.int64)
    column = tl.arange(0, HALF_BLOCK)[None, :]
    mask = column < HALF
    cos_at = cos_ptr + batch * cos_batch + token * cos_token + column
    sin_at = sin_ptr + batch * sin_batch + token * sin_token + column
    c1 = tl.load(cos_at, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(cos_at + HALF, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin_at, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin_at + HALF, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        before = s1
        s1 = -s2
        s2 = -before
    _rotate(
        q_ptr + batch * q_batch + token * q_token, yq_ptr + batch * yq_batch + token * yq_token, q_head, yq_head,
        c1, s1, c2, s2, Q_HEADS, D, HALF, Q_BLOCK, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip
    _rotate(
        k_ptr + batch * k_batch + token * k_token, yk_ptr + batch * yk_batch + token * yk_token, k_head, yk_head,
        c1, s1, c2, s2, K_HEADS, D, HALF, K_BLOCK, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip


def _run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_backward: bool) -> tuple[Tensor, Tensor]:
    """Return rotated q and k, or their gradients."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    yq, yk = torch.empty_like(q), torch.empty_like(k)
    B, q_heads, S, D = q.shape
    k_heads, R = k.shape[1], cos.shape[-1]
    half_block = next_power_of_2(R // 2)
    q_block = next_power_of_2(q_heads)
    if B * S:
        launch(
            _rotary_kernel, (B * S,),
            q, k, yq, yk, cos, sin, S,
            *q.stride()[:3], *k.stride()[:3], *yq.stride()[:3], *yk.stride()[:3],
            cos.stride(0) if len(cos) > 1 else 0, cos.stride(1), sin.stride(0) if len(sin) > 1 else 0, sin.stride(1),
            Q_HEADS=q_heads, K_HEADS=k_heads, D=D, HALF=R // 2, BACKWARD=is_backward,
            Q_BLOCK=q_block, K_BLOCK=next_power_of_2(k_heads), HALF_BLOCK=half_block,
            REST_BLOCK=next_power_of_2(D - R) if D > R else 0,
            num_warps=min(max(q_block * half_block // 512, 1), 8),
        )  # fmt: skip
    return yq, yk


class _Rotary(torch.autograd.Function):
    """Compute (q, k, cos, sin) -> rotated q and k."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _run(q, k, cos, sin, is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_run(dq, dk, *ctx.saved_tensors, is_backward=True), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys with their positions, differentiable with respect to q and k.

    Args:
        q: [B, heads, S, D].
        k: [B, heads, S, D] of the dtype of q, and perhaps with fewer heads.
        cos: [B or 1, S, R] with even R ≤ D.
        sin: As cos.

    Returns:
        As q and k, computed in float32.
    """
    yq, yk = _Rotary.apply(q, k, cos, sin)
    return yq, yk
