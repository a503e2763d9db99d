"""Liger's kernels for the frozen parts of one model.

The norms of the model use torch's and our own kernels.

How it works:

1. Liger patches names in the transformers module of a model's code, for the whole process. That would also affect other
   models in this process, including baselines that must run without Liger. So the patch is active only inside `with`.
2. RMSNorm runs torch's kernel: Liger's backward pass also computes the gradient of a weight that is not trained.
3. In Llama models each residual sum and the RMSNorm that reads it run as one kernel (`add_rms_norm.py`).

This module will move behind one public function for any architecture; until then it is what `bench` uses.
"""

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
    """Liger's kernels in one model, while it runs inside `with`.

    A model that Liger does not know stays as it is.

    Args:
        model: the base model.
        out_of_the_box: use everything of Liger's as it recommends: also its norms, and its loss, which saves memory and
            makes the host wait.

    Raises:
        ImportError: liger-kernel is not installed.
    """

    def __init__(self, model: nn.Module, out_of_the_box: bool = False) -> None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        self.names = vars(sys.modules[type(model).__module__])
        before = dict(self.names)
        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=out_of_the_box, cross_entropy=False)
        self.norms: list[Any] = (
            [] if out_of_the_box else [module for module in model.modules() if _is_liger_norm(module)]
        )
        for norm in self.norms:
            norm.forward = MethodType(_rms_norm, norm)
        if self.norms and isinstance(model, LlamaForCausalLM):
            _join_sums_and_norms(model)
        # torch.compile adds names of its own in between, which are not to be put back.
        self.before = {name: value for name, value in before.items() if self.names[name] is not value}
        self.ligers = {name: self.names[name] for name in self.before}
        self.__exit__()

    def __enter__(self) -> None:
        self.names.update(self.ligers)

    def __exit__(self, *_: object) -> None:
        self.names.update(self.before)
        for norm in self.norms:  # of a pass that raised
            norm.precomputed = None


class _Precomputed(NamedTuple):
    """Output of a norm for a tensor at a version, computed together with that tensor."""

    of: Tensor
    version: int | None
    y: Tensor


def _is_liger_norm(norm: nn.Module) -> bool:
    """Return whether Liger has patched a norm, and it is of Llama's kind."""
    return getattr(norm, "casting_mode", None) == "llama"


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Return the RMSNorm of x [..., n].

    Torch's kernel computes it, or the layer before has already computed it.
    """
    precomputed: _Precomputed | None = norm.precomputed
    norm.precomputed = None
    if precomputed and precomputed.of is x and precomputed.version == _version(x):
        return precomputed.y
    with torch.autocast(x.device.type, enabled=False):  # it would cast x to float32
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _join_sums_and_norms(model: LlamaForCausalLM) -> None:
    """Compute each residual sum together with the norm that reads it.

    The norm is the layer's own or the next layer's.
    """
    layers = list(model.model.layers)
    next_norms = [layer.input_layernorm for layer in layers[1:]] + [model.model.norm]
    for layer, norm in zip(layers, next_norms, strict=True):
        if type(layer) is LlamaDecoderLayer and _is_liger_norm(layer.post_attention_layernorm) and _is_liger_norm(norm):
            layer.forward = partial(_decoder_layer, layer, layer.forward, norm)


def _decoder_layer(
    layer: Any, original_forward: Callable[..., Tensor], next_norm: Any, hidden_states: Tensor, **options: Any
) -> Tensor:
    """Run a decoder layer.

    The norm after it finds its output in `next_norm.precomputed`.

    The layer's own second norm is not called where it is computed together with a sum, so its hooks do not run.
    """
    if layer.gradient_checkpointing and layer.training:  # a checkpoint returns a layer's output and nothing else
        return original_forward(hidden_states, **options)
    attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    hidden_states, normed = _add_rms_norm(attention, hidden_states, layer.post_attention_layernorm)
    if normed is None:
        normed = layer.post_attention_layernorm(hidden_states)
    hidden_states, normed = _add_rms_norm(layer.mlp(normed), hidden_states, next_norm)
    if normed is not None:
        next_norm.precomputed = _Precomputed(hidden_states, _version(hidden_states), normed)
    return hidden_states


def _add_rms_norm(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Return the sum, and its norm if one kernel can compute both."""
    if x.dtype != residual.dtype or norm.weight.requires_grad:
        return residual + x, None
    from malora.backbone.add_rms_norm import add_rms_norm  # needs Triton

    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)


def has_liger() -> bool:
    """Return whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None
