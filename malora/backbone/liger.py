"""Kernels for the frozen parts of one model: Liger's for rotary positions and SwiGLU, torch's and ours for norms."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM


class LigerKernels:
    """Liger's kernels in one model, which runs inside `with`; nothing changes where Liger does not know the model.

    Liger replaces names in the module of the model's code for the whole process; other models there may be on another
    device, or are to be measured without it. So the module has Liger's names inside `with` only.
    """

    def __init__(self, model: nn.Module, out_of_the_box: bool = False) -> None:
        """As it comes Liger also does the norms, and the loss, which saves memory and makes the host wait."""
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        self.names = vars(sys.modules[type(model).__module__])
        before = dict(self.names)
        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=out_of_the_box, cross_entropy=False)
        self.norms = [] if out_of_the_box else [module for module in model.modules() if _is_ligers(module)]
        for norm in self.norms:
            norm.forward = MethodType(_rms_norm, norm)
        if self.norms and isinstance(model, LlamaForCausalLM):
            _join_sums_and_norms(model)
        # torch.compile adds names of its own in between; they are not Liger's to put back.
        self.before = {name: value for name, value in before.items() if self.names[name] is not value}
        self.ligers = {name: self.names[name] for name in self.before}
        self.__exit__()

    def __enter__(self) -> None:
        self.names.update(self.ligers)

    def __exit__(self, *_: object) -> None:
        self.names.update(self.before)
        for norm in self.norms:  # of a pass that was broken off
            norm.made = None


def _is_ligers(norm: nn.Module) -> bool:
    """Whether it is a norm that Liger has taken, of Llama's kind."""
    return getattr(norm, "casting_mode", None) == "llama"


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm of x [..., h] by torch's kernel, or as the layer before has made it.

    Liger's backward pass also makes the gradient of a weight that nobody trains, most of its time at small width.
    """
    made, norm.made = norm.made, None
    if made and made.of is x and made.version == _version(x):
        return made.y
    with torch.autocast(x.device.type, enabled=False):  # it would widen x to float32
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class _Made(NamedTuple):
    """What a norm makes of a tensor as it was at a version."""

    of: Tensor
    version: int | None
    y: Tensor


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _join_sums_and_norms(model: LlamaForCausalLM) -> None:
    """Has each residual sum made together with the norm that follows, the layer's own or the next layer's."""
    layers = list(model.model.layers)
    following = [(layer.input_layernorm, layer.self_attn) for layer in layers[1:]] + [(model.model.norm, None)]
    for layer, (norm, reader) in zip(layers, following, strict=True):
        if type(layer) is LlamaDecoderLayer and _is_ligers(layer.post_attention_layernorm) and _is_ligers(norm):
            layer.forward = partial(_decoder_layer, layer, layer.forward, norm, reader)


def _decoder_layer(
    layer: LlamaDecoderLayer,
    apart: Callable[..., Tensor],
    following: nn.Module,
    reader: nn.Module | None,
    hidden_states: Tensor,
    **options: Any,
) -> Tensor:
    """The layer's forward pass. The norm that follows finds what it would make of the result in its `made`.

    The layer's own second norm is not called where it is made with a sum, and its hooks do not run.
    """
    if layer.gradient_checkpointing and layer.training:  # a checkpoint gives back a layer's result and no more
        return apart(hidden_states, **options)
    attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    hidden_states, normed = _add_norm(attention, hidden_states, layer.post_attention_layernorm, layer.mlp)
    if normed is None:
        normed = layer.post_attention_layernorm(hidden_states)
    hidden_states, normed = _add_norm(layer.mlp(normed), hidden_states, following, reader)
    if normed is not None:
        following.made = _Made(hidden_states, _version(hidden_states), normed)
    return hidden_states


def _add_norm(x: Tensor, residual: Tensor, norm: nn.Module, reader: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """The sum, and the norm of it where the kernel makes both."""
    if x.dtype != residual.dtype or norm.weight.requires_grad:
        return residual + x, None
    from malora.backbone.add_rms_norm import add_rms_norm  # needs Triton

    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)


def has_liger() -> bool:
    return find_spec("liger_kernel") is not None
