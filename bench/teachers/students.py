"""Students: adapters of `malora.METHODS` on one linear layer, many of one shape at once.

Members are stacked and computed by malora's own code for stacked adapters (`malora.stacked_layers`), so one loop trains
all seeds of a cell. The frozen layer is left out: students learn y - W x, and W cancels.

All students have about as many trained parameters as the paper's: LoRA has rank 64, MoLoRA eight experts of rank 8. For
MALoRA the paper takes the parameters that S leaves (Table 12): rank 16 - d / 8 on a square layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import malora
from malora import MaloraConfig
from malora.factors import Factors, StackedWeights
from malora.initialization import init_factors_, kaiming_uniform
from malora.stacked_layers import stacked_deltas

# A GPU's automatic choice of a backend has Triton kernels, which round otherwise than a CPU.
_BACKEND = "dense"


def _with_subspace(d: int) -> MaloraConfig:
    r = 16 - d // 8
    return malora.METHODS["malora"](d=d, r=r, lora_alpha=2 * r, backend=_BACKEND)


STUDENTS: dict[str, MaloraConfig] = {
    # One expert is LoRA. PEFT's own layer of `METHODS["lora"]` computes the same, but cannot be stacked.
    "lora": malora.METHODS["asylora"](r=64, lora_alpha=128, freeze=[], backend=_BACKEND),
    "molora": malora.METHODS["molora"](backend=_BACKEND),
    "malora-d16": _with_subspace(16),
    "malora-d32": _with_subspace(32),
    "malora-d64": _with_subspace(64),
    "malora-fixed-s": malora.METHODS["malora-fixed-s"](backend=_BACKEND),
}

Weights = dict[str, Tensor]


def start_weights(config: MaloraConfig, n: int, m: int, seeds: Sequence[int]) -> Weights:
    """Return the initial weights of a member for each seed, by name, each with K as its first dimension.

    They are those of a new malora layer after `torch.manual_seed(seed)`. Frozen factors do not require gradients.
    """
    shapes = config.factor_shapes(n, m)
    stacked = {name: torch.empty(len(seeds), *shape) for name, shape in shapes.items()}
    with torch.random.fork_rng(devices=[]):
        for k, seed in enumerate(seeds):
            torch.manual_seed(seed)
            factors = Factors(*(stacked[name][k] if name in stacked else None for name in Factors._fields))
            init_factors_(factors, beta=config.beta, same_start=config.same_start)
            if config.has_router:
                stacked["router"][k].copy_(kaiming_uniform(stacked["router"][k].shape))
    return {name: weight.requires_grad_(name not in config.freeze) for name, weight in stacked.items()}


def predict(config: MaloraConfig, weights: Weights, x_KBn: Tensor, dropout: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Compute what each member adds to the layer's output for its own inputs.

    Returns:
        The change of the output, [K, B, m], and the router's probabilities, [K, B, N], or None without a router.
    """
    down = weights["A"].flatten(1, 2) if "A" in weights else weights["S"]
    factors = Factors(None, weights.get("P"), None, weights["B"], None, None)
    stacked = StackedWeights(("layer",), weights.get("router"), down, [factors])
    (change,), probabilities = stacked_deltas(x_KBn, stacked, config, dropout)
    return change, probabilities[0] if probabilities else None


def trained_parameters(config: MaloraConfig, n: int, m: int) -> int:
    """Return the number of trained parameters of one member, router included."""
    weights = start_weights(config, n, m, [0])
    return sum(weight.numel() for weight in weights.values() if weight.requires_grad)
