"""Kernels for the frozen parts of one model: Liger's for rotary positions and SwiGLU, torch's and ours for norms."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM


class LigerKernels:
    """Liger's kernels in one model, which runs inside `with`; nothing changes where Liger does not know the model.

    Liger replaces names in the module of the model's code for the whole process; other models there may be on another
    device, or are to be measured without it. So the module has Liger's names inside `with` only.
    """

    def __init__(self, model: nn.Module, as_it_comes: bool = False) -> None:
        """As it comes Liger also does the norms, and the loss, which saves memory and makes the host wait."""
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        self.names = vars(sys.modules[type(model).__module__])
        before = dict(self.names)
        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=as_it_comes, cross_entropy=False)
        if not as_it_comes:
            for module in model.modules():
                if _is_ligers(module):
                    module.forward = MethodType(_rms_norm, module)
            if isinstance(model, LlamaForCausalLM):
                _join_sums_and_norms(model)
        # torch.compile adds names of its own in between; they are not Liger's to put back.
        self.before = {name: value for name, value in before.items() if self.names[name] is not value}
        self.ligers = {name: self.names[name] for name in self.before}
        self.__exit__()

    def __enter__(self) -> None:
        self.names.update(self.ligers)

    def __exit__(self, *_: object) -> None:
        self.names.update(self.before)


def _is_ligers(norm: nn.Module) -> bool:
    """Whether it is a norm that Liger has taken, of Llama's kind."""
    return getattr(norm, "casting_mode", None) == "llama"


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm of x [..., h] by torch's kernel, or as the layer before has made it.

    Liger's backward pass also makes the gradient of a weight that nobody trains, most of its time at small width.
    """
    made_of, y = vars(norm).pop("made", (None, None))
    if made_of is x:
        return y
    with torch.autocast(x.device.type, enabled=False):  # it would widen x to float32
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _join_sums_and_norms(model: LlamaForCausalLM) -> None:
    """Has each residual sum made together with the norm that follows, the layer's own or the next layer's."""
    layers = list(model.model.layers)
    following = [layer.input_layernorm for layer in layers[1:]] + [model.model.norm]
    for layer, norm in zip(layers, following, strict=True):
        if type(layer) is LlamaDecoderLayer and _is_ligers(layer.post_attention_layernorm) and _is_ligers(norm):
            layer.forward = partial(_decoder_layer, layer, layer.forward, norm)


def _decoder_layer(
    layer: LlamaDecoderLayer,
    apart: Callable[..., Tensor],
    following: nn.Module,
    hidden_states: Tensor,
    **options: Any,
) -> Tensor:
    """The layer's forward pass. The norm that follows finds what it would make of the result in its `made`."""
    if layer.gradient_checkpointing and layer.training:  # a checkpoint gives back a layer's result and no more
        return apart(hidden_states, **options)
    attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    hidden_states, normed = _add_norm(attention, hidden_states, layer.post_attention_layernorm)
    hidden_states, normed = _add_norm(layer.mlp(normed), hidden_states, following)
    following.made = hidden_states, normed
    return hidden_states


def _add_norm(x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    if x.dtype != residual.dtype or norm.weight.requires_grad:
        return (total := residual + x), norm(total)
    from bench.norms import add_norm  # needs Triton

    return add_norm(x, residual, norm.weight, norm.variance_epsilon)


def has_liger() -> bool:
    return find_spec("liger_kernel") is not None
