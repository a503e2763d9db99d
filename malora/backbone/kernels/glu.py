"""Gated linear units: activation and product in one kernel each way.

    y = act(gate) ⊙ up        act(x) = x · σ(z(x))

with z(x) = x for SiLU, and z(x) = 2·√(2/π)·(x + 0.044715·x³) for GELU by tanh, because (1 + tanh u) / 2 = σ(2u).
Backward, with s = σ(z(gate)):

    dup = dy ⊙ act(gate)        dgate = dy ⊙ up ⊙ (s + gate · s · (1 - s) · z'(gate))

1. The two tensors may be separate, or the column halves of one matrix [gate, up]. Rows may have any stride.
2. The backward pass saves the two inputs alone and computes the activation again.
3. Everything between the inputs and y stays in float32, so y is rounded once.

| symbol | meaning | size |
| --- | --- | --- |
| m | intermediate size | |
| gate, up, y | | [..., m] |
| gate_up | gate and up as columns of one matrix | [..., 2·m] |
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
from malora.fused.tensor_utils import cdiv

ACTIVATIONS = ("silu", "gelu_tanh")
_BLOCK = 1024  # elements per program: eight per thread of four warps, which is one load of 16 bytes in 16 bits


@triton.jit
def _gate(x, GELU: tl.constexpr):
    """Return σ(z(x)) and z'(x)."""
    if GELU:
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        z = x
        slope = x * 0.0 + 1.0
    return tl.sigmoid(z), slope


@triton.jit
def _glu_kernel(gate_ptr, up_ptr, y_ptr, m, gate_stride, up_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Compute BLOCK columns of one row of y, which is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < m
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    s, _ = _gate(gate, GELU)
    tl.store(y_ptr + row * m + columns, gate * s * up, mask=mask)


@triton.jit
def _glu_backward_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, m, gate_stride, up_stride, dy_stride, dgate_stride, dup_stride,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK columns of one row of dgate and dup."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < m
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    s, slope = _gate(gate, GELU)
    tl.store(dup_ptr + row * dup_stride + columns, dy * gate * s, mask=mask)
    tl.store(dgate_ptr + row * dgate_stride + columns, dy * up * (s + gate * s * (1.0 - s) * slope), mask=mask)


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return y [..., m] of gate and up [..., m]."""
    m = gate.shape[-1]
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _as_matrix(gate), _as_matrix(up)
    if y.numel():
        launch(
            _glu_kernel,
            (len(gate), cdiv(m, _BLOCK)),
            gate,
            up,
            y,
            m,
            gate.stride(0),
            up.stride(0),
            GELU=activation == "gelu_tanh",
            BLOCK=_BLOCK,
        )
    return y


def _backward(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor, activation: str) -> None:
    """Write the gradients of gate and up into dgate and dup, all [..., m]."""
    m = gate.shape[-1]
    gate, up, dy, dgate, dup = (_as_matrix(tensor) for tensor in (gate, up, dy, dgate, dup))
    if dy.numel():
        launch(
            _glu_backward_kernel, (len(gate), cdiv(m, _BLOCK)),
            gate, up, dy, dgate, dup, m,
            gate.stride(0), up.stride(0), dy.stride(0), dgate.stride(0), dup.stride(0),
            GELU=activation == "gelu_tanh", BLOCK=_BLOCK,
        )  # fmt: skip


class _Glu(torch.autograd.Function):
    """Compute (gate, up, activation) -> y."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        _backward(gate, up, dy, dgate, dup, ctx.activation)
        return dgate, dup, None


class _PackedGlu(torch.autograd.Function):
    """Compute (gate_up, activation) -> y."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return _packed_forward(gate_up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        (gate, up), (dgate, dup) = gate_up.chunk(2, -1), gradient.chunk(2, -1)
        _backward(gate, up, dy, dgate, dup, ctx.activation)
        return gradient, None


def _packed_forward(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return _forward(gate, up, activation)


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor [..., m] as a matrix whose rows are contiguous, and may have any stride.

    A tensor that is written needs no copy here, because it is a column slice of contiguous memory.
    """
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) ⊙ up.

    Args:
        gate: [..., m].
        up: [..., m], of the dtype of gate.
        activation: One of `ACTIVATIONS`.

    Returns:
        [..., m] in the dtype of gate, contiguous, computed in float32.
    """
    y: Tensor = _Glu.apply(gate, up, activation)
    note(y, _forward, gate, up, activation)
    return y


def packed_glu(gate_up: Tensor, activation: str) -> Tensor:
    """Return act(gate) ⊙ up for [gate, up] as one matrix [..., 2·m].

    The gradient is one matrix too, so nothing is concatenated.
    """
    y: Tensor = _PackedGlu.apply(gate_up, activation)
    note(y, _packed_forward, gate_up, activation)
    return y
