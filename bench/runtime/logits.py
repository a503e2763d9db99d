"""Compute logits at label positions only.

Symbol  Meaning
B       sequences in a batch
S       tokens per sequence
h       hidden size
L       number of label positions
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _CausalLM(Protocol):
    """A language model of transformers, or a PEFT model.

    A PEFT model passes this method on to its base model.
    """

    def get_output_embeddings(self) -> nn.Linear: ...


@contextmanager
def label_positions_only(model: nn.Module, row: Tensor, column: Tensor, in_float32: bool = False) -> Iterator[None]:
    """Apply the language model's head only at some positions inside the `with` block.

    The logits then have the shape [L, vocabulary] instead of [B, S, vocabulary].

    Args:
        model: A causal language model, with or without adapters.
        row: [L], sequence of each label position in the batch.
        column: [L], position within the sequence.
        in_float32: Compute the head's matmul in float32, whatever the dtype of the weights and of autocast.
    """
    head = cast(_CausalLM, model).get_output_embeddings()

    def select_positions(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden_BSh = inputs[0]
        return (hidden_BSh.flatten(0, 1).index_select(0, row * hidden_BSh.shape[1] + column),)

    def recompute_in_float32(_: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return F.linear(inputs[0].float(), head.weight.float(), bias)

    handles = [head.register_forward_pre_hook(select_positions)]
    if in_float32:
        handles.append(head.register_forward_hook(recompute_in_float32))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
