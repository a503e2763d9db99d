"""SwiGLU and GeGLU of MLP modules: one kernel each way instead of two or more.

A module is one if it computes down(act(gate(x)) ⊙ up(x)) with SiLU or GELU by tanh. Gate and up are two linear layers,
or one whose outputs are [gate, up].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora.backbone.probe import FixedLinear, bare_copy, can_run, is_close, numbers, result_of

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
_SEPARATE, _PACKED = {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}


@dataclass
class GluSettings:
    """What the forward pass of an MLP needs to know.

    Attributes:
        activation: "silu" or "gelu_tanh".
        is_packed: Whether gate and up are the column halves of one layer's output.
        name: Name of the activation in the module.
    """

    activation: str
    is_packed: bool
    name: str


def settings(module: nn.Module) -> GluSettings | None:
    """Return the settings of a gated MLP; None if the module is something else."""
    names = [name for name in ("act_fn", "activation_fn") if callable(getattr(module, name, None))]
    layers = set(module._modules) - set(names)
    if layers not in (_SEPARATE, _PACKED) or len(names) != 1 or module._parameters:
        return None
    is_packed = layers == _PACKED
    down, gate, up = numbers(2, 3), 3 * numbers(3, 4), 2 * numbers(3, 4).flip(0)
    weights = {"gate_up_proj": torch.cat([gate, up])} if is_packed else {"gate_proj": gate, "up_proj": up}
    children: dict[str, nn.Module] = {
        name: FixedLinear(weight) for name, weight in {**weights, "down_proj": down}.items()
    }
    for name in names:
        if isinstance(child := module._modules.get(name), nn.Module):
            children[name] = child
    x = numbers(5, 4)
    probed = result_of(lambda: bare_copy(module, children).forward(x))
    for activation, function in _FUNCTIONS.items():
        if is_close(probed, (function(x @ gate.T) * (x @ up.T)) @ down.T):
            return GluSettings(activation, is_packed, names[0])
    return None


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward that uses the kernel where it can."""
    from malora.backbone.kernels.glu import glu, packed_glu  # needs Triton

    original = base.forward

    @wraps(original)
    def forward(self: Any, *inputs: Tensor, **named: Any) -> Any:
        if named or torch.compiler.is_compiling():
            return original(self, *inputs, **named)
        (x,) = inputs
        own: GluSettings = self.malora_settings
        if own.is_packed:
            gate_up = self.gate_up_proj(x)
            if can_run(gate_up):
                return self.down_proj(packed_glu(gate_up, own.activation))
            gate, up = gate_up.chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
            if can_run(gate) and gate.dtype == up.dtype:
                return self.down_proj(glu(gate, up, own.activation))
        return self.down_proj(getattr(self, own.name)(gate) * up)

    return forward
