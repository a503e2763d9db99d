"""How public code computes a mixture of LoRA experts, written to be compared with.

`loop` is a backend as `malora.backends` has them, known to the tuner only inside `registered()`, that is in the
profiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from malora import BACKENDS
from malora.backends import Backend
from malora.factors import Factors
from malora.routing import Routing


@contextmanager
def registered_baselines() -> Iterator[None]:
    """Inside it, MaloraConfig(backend=...) takes "loop" too."""
    BACKENDS["loop"] = Backend(expert_loop, graph_safe=False)
    try:
        yield
    finally:
        del BACKENDS["loop"]


def expert_loop(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """Expert by expert: find its tokens, gather them, apply its LoRA, weigh, add into the output.

    The behaviour of `MolaSparseMoe.forward` in TUDB-Labs/MoE-PEFT, moe_peft/adapters/mola/model.py at commit
    8115bbfce551f6e026f522b28117f985a02b10d7, which, as the paper's MoLoRA does, routes at every linear map. The same
    loop stands in MixLoRA and in the mixtures that follow it. Each `torch.where` makes the host wait for the device.
    It runs here in the precision of all the others, where the original widens its activations to float32; and it takes
    the gate of equation 4, which is not renormalised.
    """
    gate_TN = torch.ones_like(x_Tn[:, :1]) if routing is None else routing.gate
    y_Tm = None
    for t, (down_rn, up_rm) in enumerate(zip(factors.down(), factors.up(), strict=True)):
        (token,) = torch.where(gate_TN[:, t] != 0)
        out = (x_Tn[token] @ down_rn.T @ up_rm) * scaling
        if y_Tm is None:
            y_Tm = out.new_zeros(len(x_Tn), out.shape[1])
        y_Tm.index_add_(0, token, out * gate_TN[token, t, None].to(out.dtype))
    return y_Tm
