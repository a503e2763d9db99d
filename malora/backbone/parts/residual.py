"""Residual sums of decoder layers, each in one kernel with the norm that reads it.

A layer is one if it computes

    h = x + attention(norm1(x))        y = h + mlp(norm2(h))

The first sum is read by the layer's own second norm. The second sum is read by the first norm of the next layer, or by
the norm after the last layer. A norm is always called, so its hooks run; it then finds its output already computed.
Layers that norm before they add, such as Gemma's and OLMo 2's, are of another kind, and keep their own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from malora.backbone.parts.norm import NormSettings, Precomputed, can_fuse, version_of
from malora.backbone.probe import bare_copy, is_close, numbers, result_of

_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@dataclass
class ResidualSettings:
    """What the forward pass of a decoder layer needs to know.

    Attributes:
        dropouts: Dropout of the sublayers' outputs, which is left out while its probability is 0.
        next_norm: The norm that reads the layer's output, or None if it is not known. Not a child of the layer.
    """

    dropouts: list[nn.Dropout]
    next_norm: nn.Module | None = None


class _Norm(nn.Module):
    """A stand-in for a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + 0.1


class _Attention(nn.Module):
    """A stand-in for attention, which checks that options are passed on."""

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        assert options.get("attention_mask") == 1 and options.get("position_embeddings") == 2
        assert options.get("position_ids") == 3 and options.get("another") == 4
        return hidden_states.cos() * 0.7, None


class _Mlp(nn.Module):
    """A stand-in for an MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp() * 0.3


def settings(module: nn.Module) -> ResidualSettings | None:
    """Return the settings of a decoder layer that norms before its sublayers; None for any other module."""
    others = {name: child for name, child in module._modules.items() if name not in _CHILDREN}
    dropouts = [child for child in others.values() if type(child) is nn.Dropout]
    if len(others) != len(dropouts) or len(module._modules) != len(others) + len(_CHILDREN) or module._parameters:
        return None
    norm, mlp, attention = _Norm(), _Mlp(), _Attention()
    children = dict(zip(_CHILDREN, (norm, attention, norm, mlp), strict=True)) | {n: nn.Identity() for n in others}
    layer = bare_copy(module, children)
    layer.eval()  # a checkpoint is of no use here
    x = numbers(2, 3, 4)
    options = {"attention_mask": 1, "position_embeddings": 2, "position_ids": 3, "another": 4}
    probed = result_of(lambda: layer.forward(x, **options))
    h = x + norm(x).cos() * 0.7
    return ResidualSettings(dropouts) if is_close(probed, h + mlp(norm(h))) else None


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward that computes sums and norms together where it can."""
    original = base.forward

    @wraps(original)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        own: ResidualSettings = self.malora_settings
        if args or torch.compiler.is_compiling() or any(dropout.p for dropout in own.dropouts):
            return original(self, hidden_states, *args, **options)
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        hidden_states = _add(attention, hidden_states, self.post_attention_layernorm)
        mlp = self.mlp(self.post_attention_layernorm(hidden_states))
        # A checkpoint returns a layer's output and nothing else.
        is_checkpointed = self.training and getattr(self, "gradient_checkpointing", False)
        return _add(mlp, hidden_states, None if is_checkpointed else own.next_norm)

    return forward


def _add(x: Tensor, residual: Tensor, norm: Any) -> Tensor:
    """Return the sum. If one kernel can also compute its norm, leave that for the norm to find."""
    own = norm.malora_settings if getattr(type(norm), "malora_part", None) == "norm" else None
    if not isinstance(own, NormSettings) or own.offset or x.dtype != residual.dtype or x.device != residual.device:
        return residual + x
    # FSDP and DeepSpeed gather the weights of a module when it is called, and here it is not called yet.
    is_gathered = type(norm.weight) is nn.Parameter and norm.weight.shape == x.shape[-1:]
    if x.shape != residual.shape or not is_gathered or not can_fuse(norm, x):
        return residual + x
    from malora.backbone.kernels.add_rms_norm import add_rms_norm  # needs Triton

    total, y = add_rms_norm(x, residual, norm.weight, own.eps)
    own.precomputed = Precomputed(total, version_of(total), y)
    return total
