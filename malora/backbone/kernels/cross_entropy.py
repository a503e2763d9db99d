"""Cross entropy of logits and its gradient, which replaces them in memory.

    loss = log Σ exp(c(l)) - c(l_t)        dl = (softmax(c(l)) - onehot(t)) ⊙ c'(l)

with c(l) = cap · tanh(l / cap) in models that cap their logits (Gemma 2), and c(l) = l in others. A program computes
one row in two passes: one for the sum, with the largest logit so far, and one for the gradient.

| symbol | meaning | size |
| --- | --- | --- |
| L | rows | |
| V | vocabulary | |
| logits | of the model's dtype, overwritten by the gradient | [L, V] |
| targets | the label of each row | [L] |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels.launch import launch
from malora.fused.tensor_utils import next_power_of_2

_BLOCK = 4096  # logits per step of a program's loops


@triton.jit
def _capped(x, CAP: tl.constexpr):
    if CAP > 0.0:
        x = CAP * (2.0 * tl.sigmoid(2.0 * x / CAP) - 1.0)
    return x


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, loss_ptr, V, IGNORED: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Compute the loss of one row and its gradient; both are 0 if the row has no label."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * V
    columns = tl.arange(0, BLOCK)
    if target == IGNORED:
        tl.store(loss_ptr + row, 0.0)
        if WITH_GRADIENT:
            for start in range(0, V, BLOCK):
                zeros = tl.zeros([BLOCK], dtype=tl.float32)
                tl.store(logits_ptr + start + columns, zeros, mask=start + columns < V)
    else:
        largest = -float("inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            mask = start + columns < V
            x = _capped(tl.load(logits_ptr + start + columns, mask=mask, other=0.0).to(tl.float32), CAP)
            x = tl.where(mask, x, -float("inf"))
            now = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - now) + tl.sum(tl.exp(x - now), 0)
            largest = now
        log_sum = largest + tl.log(total)
        # A label outside of the vocabulary must not read other memory. Its loss is NaN.
        is_known = (target >= 0) & (target < V)
        of_target = tl.load(logits_ptr + target, mask=is_known, other=float("nan")).to(tl.float32)
        tl.store(loss_ptr + row, log_sum - _capped(of_target, CAP))
        if WITH_GRADIENT:
            for start in range(0, V, BLOCK):
                mask = start + columns < V
                x = _capped(tl.load(logits_ptr + start + columns, mask=mask, other=0.0).to(tl.float32), CAP)
                gradient = tl.exp(x - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
                if CAP > 0.0:
                    gradient *= 1.0 - (x / CAP) * (x / CAP)
                tl.store(logits_ptr + start + columns, gradient, mask=mask)


def cross_entropy_(logits: Tensor, targets: Tensor, ignored: int, cap: float | None, *, with_gradient: bool) -> Tensor:
    """Return the loss of each row, [L] in float32, and overwrite the logits with its gradient.

    Args:
        logits: [L, V], contiguous.
        targets: [L], labels in [0, V) or `ignored`.
        ignored: The label of rows that have no loss.
        cap: Bound of the logits, or None.
        with_gradient: Whether to overwrite the logits.
    """
    L, V = logits.shape
    loss = torch.empty(L, dtype=torch.float32, device=logits.device)
    if L:
        launch(
            _cross_entropy_kernel, (L,),
            logits, targets, loss, V, IGNORED=ignored, CAP=cap or 0.0, BLOCK=min(_BLOCK, next_power_of_2(V)),
            WITH_GRADIENT=with_gradient, num_warps=8,
        )  # fmt: skip
    return loss
