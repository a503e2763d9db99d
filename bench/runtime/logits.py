"""Compute logits at label positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def label_positions_only(model: nn.Module, row: Tensor, column: Tensor, in_float32: bool = False) -> Iterator[None]:
    """Inside it the model's head sees the hidden states at [row, column] only: its logits are [L, vocabulary].

    With `in_float32` its product is in that precision, whatever the weights' and autocast's.
    """
    head = model.get_output_embeddings()

    def select(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden_BSh = inputs[0]
        return (hidden_BSh.flatten(0, 1).index_select(0, row * hidden_BSh.shape[1] + column),)

    def widen(_: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return F.linear(inputs[0].float(), head.weight.float(), bias)

    handles = [head.register_forward_pre_hook(select)]
    if in_float32:
        handles.append(head.register_forward_hook(widen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
