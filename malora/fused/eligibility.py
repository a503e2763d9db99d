"""Decide if a layer can take the fused path, and say why if it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from malora.config import MaloraConfig, resolve_backend
from malora.factors import StackedWeights
from malora.fused.availability import has_triton, interprets_triton, warn_once
from malora.fused.four_bit_weights import has_four_bits, reason_not_dequantized

if TYPE_CHECKING:
    from malora.fused.protocol import FusedLayer

FUSED_BACKENDS = frozenset({"fused", "fp8"})

# Where an `nn.Module` keeps its hooks. It has no public way to ask for them.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def find_fused_adapter(layer: FusedLayer, *, is_sharded: bool) -> str | None:
    """Return the adapter to compute together with the frozen layer, or None.

    Every layer asks this in every pass, so the usual answers must be cheap.

    Args:
        layer: the adapted layer.
        is_sharded: whether FSDP2 has sharded the layer's weights.

    If an active adapter asks for the fused path and cannot have it, the reason is logged once.
    """
    if layer.disable_adapters or layer.merged:
        return None
    settings, base = layer.settings, layer.base_layer
    device = (base.weight if isinstance(base, nn.Linear) else layer.weight).device  # gptqmodel's have a `qweight`
    active = [adapter for adapter in layer.active_adapters if adapter in settings]
    configs = [settings[adapter] for adapter in active]
    if FUSED_BACKENDS.isdisjoint([resolve_backend(config, device) for config in configs]):
        return None
    reason = reason_not_fused(layer, configs, is_sharded=is_sharded)
    if reason is None:
        return active[0]
    for asked in {config.backend for config in configs} & FUSED_BACKENDS:
        warn_once(asked, reason, "the dense backend")
    return None


def reason_not_fused(layer: FusedLayer, configs: list[MaloraConfig], *, is_sharded: bool) -> str | None:
    """Return what keeps active adapters of a layer from the fused path, or None.

    The text completes the sentence "backend 'fused' cannot compute ...".
    """
    base, config = layer.base_layer, configs[0]
    if len(configs) > 1:
        return "several adapters at once"
    if has_four_bits(base):
        if config.backend == "fp8":
            return "weights in 4 bits"
        if reason := reason_not_dequantized(base):
            return reason
    elif type(base) is not nn.Linear:
        return f"a {type(base).__name__}"
    if is_sharded:  # such weights come and go: copies of them would be stale
        return "weights that FSDP has sharded"
    if hasattr(base, "_hf_hook"):
        return "weights that accelerate moves"
    if "forward" in vars(base) or any(vars(base)[hooks] for hooks in _HOOKS):  # nobody calls the frozen layer
        return "a frozen layer with hooks"
    weight, bias = base.weight, base.bias
    if type(weight) not in (nn.Parameter, Tensor) and not has_four_bits(base):  # torchao leaves the nn.Linear
        return f"a weight of type {type(weight).__name__}"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "a base that is trained too"
    if config.up != "B_t":
        return f"up={config.up!r}"
    if config.down != "A_t" and not config.has_router:
        return f"{'one expert' if config.num_experts == 1 else 'uniform gates'} with down={config.down!r}"
    if not (has_triton() if weight.is_cuda else interprets_triton()):
        return f"on {weight.device.type}, with Triton {'' if has_triton() else 'not '}installed"
    return None


def can_use_kernels(config: MaloraConfig, device: torch.device) -> bool:
    """Return whether single kernels of the fused path can compute parts of an adapter, where the path itself cannot."""
    if resolve_backend(config, device) not in FUSED_BACKENDS or torch.compiler.is_compiling():
        return False
    return has_triton() if device.type == "cuda" else interprets_triton()


def can_fuse_stack(layer: FusedLayer, config: MaloraConfig, weights: StackedWeights, x: Tensor) -> bool:
    """Return whether stacked adapters can be computed together with a frozen layer (`stacked_group.py`).

    Args:
        layer: The adapted layer.
        config: Settings of the adapters.
        weights: Their weights on the layer's group.
        x: Input of the layer.
    """
    if not can_use_kernels(config, x.device) or reason_not_fused(layer, [config], is_sharded=False) is not None:
        return False
    if config.down == "P_t S_t":  # each expert reads columns of its own
        return False
    return x.dtype == layer.base_layer.weight.dtype == weights.down.dtype
