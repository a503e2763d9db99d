"""Decide if a layer can take the fused path, and say why if it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from malora.config import MaloraConfig, resolve_backend
from malora.fused.availability import has_triton, interprets_triton, warn_once

if TYPE_CHECKING:
    from malora.fused.protocol import FusedLayer

FUSED_BACKENDS = frozenset({"fused", "fp8"})


def find_fused_adapter(layer: FusedLayer, *, is_sharded: bool) -> str | None:
    """Return the adapter to compute together with the frozen layer, or None.

    Args:
        layer: the adapted layer.
        is_sharded: whether FSDP2 has sharded the layer's weights.

    If an active adapter asks for the fused path and cannot have it, the reason is logged once.
    """
    if layer.disable_adapters or layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.settings]
    device = layer.base_layer.weight.device
    if not any(resolve_backend(layer.settings[adapter], device) in FUSED_BACKENDS for adapter in active):
        return None
    reason = reason_not_fused(layer, [layer.settings[adapter] for adapter in active], is_sharded=is_sharded)
    if reason is None:
        return active[0]
    for asked in {layer.settings[adapter].backend for adapter in active} & FUSED_BACKENDS:
        warn_once(asked, reason, "the dense backend")
    return None


def reason_not_fused(layer: FusedLayer, configs: list[MaloraConfig], *, is_sharded: bool) -> str | None:
    """Return what keeps active adapters of a layer from the fused path, or None.

    The text completes the sentence "backend 'fused' cannot compute ...".
    """
    base, config, device = layer.base_layer, configs[0], layer.base_layer.weight.device
    runs_triton = has_triton() if device.type == "cuda" else interprets_triton()
    obstacles = {
        "several adapters at once": len(configs) > 1,
        f"a {type(base).__name__}": type(base) is not nn.Linear,
        # Sharded weights come and go: copies of them would be stale.
        "weights that FSDP has sharded": is_sharded,
        "a base that is trained too": any(parameter.requires_grad for parameter in base.parameters()),
        f"up={config.up!r}": config.up != "B_t",
        f"one expert with down={config.down!r}": config.down != "A_t" and not config.has_router,
        f"on {device.type}, with Triton {'' if has_triton() else 'not '}installed": not runs_triton,
    }
    return next((reason for reason, applies in obstacles.items() if applies), None)
