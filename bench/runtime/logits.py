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
from torch.func import functional_call

import malora


class _CausalLM(Protocol):
    """A language model of transformers, or a PEFT model.

    A PEFT model passes this method on to its base model.
    """

    def get_output_embeddings(self) -> nn.Module | None: ...


@contextmanager
def label_positions_only(model: nn.Module, row: Tensor, column: Tensor, in_float32: bool = False) -> Iterator[None]:
    """Apply the language model's head only at some positions inside the `with` block.

    The logits then have the shape [L, vocabulary] instead of [B, S, vocabulary]. They are those of a full forward pass,
    with the adapter on the head if there is one.

    Args:
        model: A causal language model, with or without adapters.
        row: [L], sequence of each label position in the batch.
        column: [L], position within the sequence.
        in_float32: Compute the head in float32, whatever the dtype of the weights and of autocast.

    Raises:
        ValueError: The model has no head, or an adapter of PEFT puts virtual tokens in front of the sequences, so that
            positions are not those of the input.
    """
    head = cast(_CausalLM, model).get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head, so it computes no logits.")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("adapters of virtual tokens (prompt tuning, prefix tuning) shift the positions of the labels.")
    recomputing = False

    def select_positions(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if recomputing:
            return None
        hidden_BSh = inputs[0]
        return (hidden_BSh.flatten(0, 1).index_select(0, row * hidden_BSh.shape[1] + column),)

    def recompute_in_float32(_: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor | None:
        nonlocal recomputing
        if recomputing:
            return None
        recomputing = True
        try:
            with torch.autocast(logits.device.type, enabled=False):
                return _apply_in_float32(head, inputs[0].float())
        finally:
            recomputing = False

    handles = [head.register_forward_pre_hook(select_positions)]
    if in_float32:
        handles.append(head.register_forward_hook(recompute_in_float32))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apply_in_float32(head: nn.Module, hidden_Lh: Tensor) -> Tensor:
    """Apply a head with its weights cast to float32; returns logits [L, vocabulary]."""
    if type(head) is nn.Linear:
        bias = None if head.bias is None else head.bias.float()
        return F.linear(hidden_Lh, head.weight.float(), bias)
    if isinstance(head, malora.MaloraLayer) and not (head.disable_adapters or head.merged):
        # Not by `functional_call`: the fused path would keep copies of temporary weights.
        logits_LV = _apply_in_float32(head.base_layer, hidden_Lh)
        deltas = [head.delta(adapter, hidden_Lh) for adapter in head.active_adapters if adapter in head.settings]
        return sum(deltas, start=logits_LV)
    tensors = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    # Quantized weights are integers, and stay as they are.
    in_float32 = {name: t.detach().float() for name, t in tensors.items() if t.is_floating_point()}
    logits: Tensor = functional_call(head, in_float32, (hidden_Lh,))
    return logits
