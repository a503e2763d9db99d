"""Frozen output head and cross entropy together, without keeping the logits.

    loss = Σ over rows of cross_entropy(c(h Wᵀ + b), target)

1. Rows are computed in chunks. The logits of a chunk are overwritten by their gradient, and that gives the chunk's
   gradient of h in the forward pass. So at no time are there logits of more than one chunk.
2. The gradient is kept without the factor that comes from later: it is in 16 bits, and the number of labels or the
   scale of a loss scaler belong into that factor.
3. The weight gets no gradient, so the head must be frozen.

| symbol | meaning | size |
| --- | --- | --- |
| T | positions | |
| L | those that have a label, or all | |
| n | hidden size | |
| V | vocabulary | |
| hidden | | [T, n] |
| weight, bias | of the head | [V, n], [V] |
| targets | the label of each position | [T] |
| rows | positions that have a label | [L] |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.backbone.probe import can_run

# Logits of a chunk: 128 MiB in 16 bits. With vocabularies of 32 to 256 thousand these are 2048 to 256 rows, enough for
# a GEMM to be as fast as with more.
MAX_CHUNK_ELEMENTS = 1 << 26


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute (hidden, weight, bias, targets, rows, ignored, cap) -> the sum of the losses, [] in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None,
        ignored: int, cap: float | None,
    ) -> Tensor:  # fmt: skip
        with_gradient = ctx.needs_input_grad[0]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        count = len(targets) if rows is None else len(rows)
        loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        gradient = torch.empty(count, hidden.shape[1], dtype=dtype, device=hidden.device) if with_gradient else None
        chunk = max(MAX_CHUNK_ELEMENTS // len(weight), 1)
        with torch.autocast(device, enabled=False):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, count, chunk):
                part = slice(start, min(start + chunk, count))
                chosen = part if rows is None else rows[part]
                logits = F.linear(hidden[chosen].to(dtype), weight, bias)
                losses, d_logits = _loss_and_gradient(logits, targets[chosen], ignored, cap, with_gradient)
                loss += losses.sum()
                if gradient is not None:
                    torch.mm(d_logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient, rows)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        gradient = (gradient * factor).to(ctx.dtype)
        if rows is not None:
            gradient = gradient.new_zeros(ctx.shape).index_copy_(0, rows, gradient)
        return gradient, None, None, None, None, None, None


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, ignored: int, cap: float | None, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, [L], and the gradient of the logits, [L, V]."""
    if can_run(logits):
        from malora.backbone.kernels.cross_entropy import cross_entropy_  # needs Triton

        return cross_entropy_(logits, targets, ignored, cap, with_gradient=with_gradient), logits
    wide = logits.float() if logits.dtype != torch.float64 else logits
    if cap is not None:
        wide = cap * torch.tanh(wide / cap)
    losses = F.cross_entropy(wide, targets, ignore_index=ignored, reduction="none")
    if not with_gradient:
        return losses, logits
    has_label = targets != ignored
    gradient = wide.softmax(-1)
    gradient[torch.arange(len(targets), device=targets.device), targets.where(has_label, 0)] -= 1
    if cap is not None:
        gradient *= 1 - (wide / cap).square()
    return losses, (gradient * has_label[:, None]).to(logits.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, rows: Tensor | None = None,
    ignored: int = -100, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the summed cross entropy of a frozen head's logits, differentiable with respect to hidden.

    Under autocast the head runs in autocast's dtype. The loss is computed in float32.

    Args:
        hidden: [T, n].
        weight: [V, n], frozen.
        bias: [V], frozen, or None.
        targets: [T], labels in [0, V) or `ignored`.
        rows: [L], positions to compute, which are all that have a label; None for all positions.
        ignored: The label of positions that have no loss.
        cap: The logits are cap · tanh(logits / cap); None leaves them as they are.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, rows, ignored, cap)  # type: ignore[no-untyped-call]
    return loss


class LabelPositions:
    """Positions that have a label, found without making the device wait for the host.

    Create it before the model runs, and call `rows()` after. On a GPU the number of positions is copied to the host
    while the device works on the model's layers, so the host waits for the work before them only.

    Args:
        targets: [T], labels, or `ignored` where there is none.
        ignored: The label of positions that have no loss.
    """

    def __init__(self, targets: Tensor, ignored: int) -> None:
        self._has_label = targets != ignored
        self._is_captured = targets.is_cuda and torch.cuda.is_current_stream_capturing()
        if targets.is_cuda and not self._is_captured:
            self._order = self._has_label.to(torch.int8).argsort(descending=True, stable=True)
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_(self._has_label.sum(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def count(self) -> Tensor:
        """Number of positions that have a label, [], on the device."""
        return self._has_label.sum()

    def rows(self) -> Tensor | None:
        """Return the positions, [L]; None for all, while a CUDA graph is captured, because it must not wait."""
        if self._is_captured:
            return None
        if not self._has_label.is_cuda:
            return self._has_label.nonzero().flatten()
        self._copied.synchronize()
        return self._order[: int(self._count)]
