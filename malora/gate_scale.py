"""Matched scale: adapters whose gates have different sums start with an equal update.

The update of a layer is `scaling · Σ_t g_t U_t D_t x`. At the start the gates of 2 of 8 experts have a sum of about
0.3, and renormalised gates have 1. At one scaling and one learning rate the second adapter learns about three times as
fast, whether or not its router is better. With `match_scale` the scaling is divided by the mean sum of the gates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from malora.config import MaloraConfig
from malora.layer import MaloraLayer
from malora.load_balancing import router_stats


def match_gate_scale(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, adapter: str = "default") -> float:
    """Measure the mean sum of an adapter's gates, and divide its scaling by it.

    Call it before training, with the first batch. The mean is over all routers and all tokens that are not padding. It
    is one number per adapter, so that layers keep their relation. The config keeps it as `mean_gate_sum`, and it is
    saved and loaded with the adapter.

    Args:
        model: Model from `get_peft_model` with the adapter, whose config has `match_scale=True`.
        batches: Arguments of the model's forward pass, one mapping per pass. No labels are needed. The passes run in
            evaluation mode, without gradients.
        adapter: Name of the adapter.

    Returns:
        The mean sum of the gates of a token.

    Raises:
        ValueError: The adapter does not exist or does not have `match_scale=True`; there is no batch; or the adapter
            is in a stack already.
    """
    layers = [m for m in model.modules() if isinstance(m, MaloraLayer) and adapter in m.settings]
    if not layers:
        raise ValueError(f"there is no adapter {adapter!r} with experts on linear layers; name one as adapter=.")
    if not layers[0].settings[adapter].match_scale:
        raise ValueError(f"adapter {adapter!r} does not match its scale; make its config with match_scale=True.")
    if any(adapter in stack.names for layer in layers if (log := layer.routing_log) for stack in log.stacks):
        raise ValueError(f"adapter {adapter!r} is in a stack; match its scale before stack_adapters.")
    mean = _mean_gate_sum(model, batches, adapter)
    set_mean_gate_sum(model, mean, adapter=adapter)
    return mean


def set_mean_gate_sum(model: nn.Module, mean: float, *, adapter: str = "default") -> None:
    """Divide an adapter's scaling by a mean that was measured before, such as in another process.

    Args:
        model: Model with the adapter, whose config has `match_scale=True`.
        mean: What `match_gate_scale` returned.
        adapter: Name of the adapter.
    """
    configs: list[Any] = [getattr(m, "peft_config", {}).get(adapter) for m in model.modules()]
    for layer in model.modules():
        if isinstance(layer, MaloraLayer) and adapter in layer.settings:
            configs.append(layer.settings[adapter])  # with rank_pattern it is a copy
            layer.group.clear_caches()  # kernels have the scaling as a constant
    for config in configs:
        if isinstance(config, MaloraConfig):
            config.mean_gate_sum = mean


@torch.no_grad()
def _mean_gate_sum(model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter: str) -> float:
    """Return the mean over all routers and all tokens of all batches."""
    total, tokens = 0.0, 0.0
    modes = [(module, module.training) for module in model.modules()]  # PEFT's wrapper may differ from the base
    model.eval()
    try:
        for batch in batches:
            model(**batch)
            sums = [stats.gate_sum for stats in router_stats(model, adapter=adapter).values()]
            mask = batch.get("attention_mask")
            count = batch["input_ids"].numel() if mask is None else int((mask != 0).sum())
            total, tokens = total + count * sum(sums) / len(sums), tokens + count
    finally:
        for module, mode in modes:
            module.training = mode
    if not tokens:
        raise ValueError("match_gate_scale needs a batch with tokens; give the first batch of the training.")
    return total / tokens


def check_scale_is_matched(layers: Iterable[MaloraLayer]) -> None:
    """Refuse to train adapters whose scale is still to be matched.

    Raises:
        ValueError: There is such an adapter.
    """
    for layer in layers:
        for name in layer.active_adapters:
            config = layer.settings.get(name)
            if config is not None and config.match_scale and config.mean_gate_sum is None:
                raise ValueError(
                    f"adapter {name!r} has match_scale=True, and the sum of its gates is not known yet. Call "
                    "malora.match_gate_scale(model, [first_batch]) before training."
                )
        return  # all layers have the same adapters
