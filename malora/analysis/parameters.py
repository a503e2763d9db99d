"""Counts of an adapter's parameters, from sizes alone.

Shapes: n inputs and m outputs of a linear layer.
"""

from __future__ import annotations

import math

from peft import LoraConfig, PeftConfig

from malora.config import MaloraConfig


def count_trainable(config: PeftConfig, in_features: int, out_features: int, *, router: bool = True) -> int:
    """Return the number of trainable parameters of an adapter on one linear layer.

    Args:
        config: A config from METHODS.
        in_features: n.
        out_features: m.
        router: Whether the router counts. The paper leaves it out.

    Raises:
        TypeError: the config is of another PEFT method.
    """
    if isinstance(config, MaloraConfig):
        shapes = config.factor_shapes(in_features, out_features)
        frozen = set(config.freeze) | (set() if router else {"router"})
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in frozen)
    if isinstance(config, LoraConfig):
        magnitudes = out_features if config.use_dora else 0  # DoRA trains the norm of every output's weights
        return config.r * (in_features + out_features) + magnitudes
    raise TypeError(f"cannot count the parameters of a {type(config).__name__}; give a config from METHODS.")
