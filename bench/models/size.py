"""Refuse adapters that are too large for the machine before they are made."""

from __future__ import annotations

import psutil
import torch
from peft import PeftConfig
from torch import nn

from bench.errors import UserError

# A trained value is a float32 weight, its gradient and the two moments of AdamW.
BYTES_PER_PARAMETER = 4 * 4


def require_memory(model: nn.Module, method: str, config: PeftConfig) -> None:
    """Check that an adapter of this config could fit the memory of the model's device.

    The estimate is a lower bound: it leaves out down projections, activations and what else is in memory. So it refuses
    only what cannot work.

    Args:
        model: The base model.
        method: Name of the method, for the message.
        config: Config of the adapter.

    Raises:
        UserError: It needs more memory than the device has.
    """
    device = next(model.parameters()).device
    needed = BYTES_PER_PARAMETER * count_at_least(model, config)
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
    if needed > there:
        options = [f"{name}={value}" for name in ("r", "num_experts", "d") if (value := getattr(config, name, None))]
        raise UserError(
            f"{method} with {', '.join(options)} needs at least {needed / 1e9:,.0f} GB to train on this base, and "
            f"{'the GPU' if device.type == 'cuda' else 'this machine'} has {there / 1e9:,.0f} GB; choose smaller ones."
        )


def count_at_least(model: nn.Module, config: PeftConfig) -> int:
    """Return a lower bound of an adapter's number of trained values: its routers and its up projections.

    Targets that are a regular expression, or not named, are not counted.
    """
    targets = getattr(config, "target_modules", None)
    names = set() if isinstance(targets, str) else set(targets or ())
    experts, rank = getattr(config, "num_experts", 1), getattr(config, "r", 0)
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and names & {name, name.rpartition(".")[2]}:
            count += experts * module.in_features * (experts > 1)
            # The other form of the up projection has r x d values per expert, over a subspace of the outputs.
            outputs = module.out_features if getattr(config, "up", "B_t") == "B_t" else getattr(config, "d", None) or 0
            count += experts * rank * outputs
    return count
