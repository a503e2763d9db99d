"""Baselines that other projects' code stands for, written as backends of `malora`.

`loop` computes a mixture of LoRA experts as published code does. `malora` itself does not offer it: `MaloraConfig`
accepts it only inside `registered_baselines()`.
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
    """Let `MaloraConfig` accept `backend="loop"` inside the `with` block."""
    BACKENDS["loop"] = Backend(expert_loop, graph_safe=False)
    try:
        yield
    finally:
        del BACKENDS["loop"]


def expert_loop(x_Tn: Tensor, routing: Routing | None, factors: Factors, scaling: float) -> Tensor:
    """Compute the experts one after another, each on its own tokens.

    For each expert: find its tokens, gather them, apply its LoRA, weight by the gate, add into the output. This follows
    `MolaSparseMoe.forward` of TUDB-Labs/MoE-PEFT, moe_peft/adapters/mola/model.py, at commit
    8115bbfce551f6e026f522b28117f985a02b10d7. Like the paper's MoLoRA, it routes at every linear layer. MixLoRA and its
    successors use the same loop. Each `torch.where` makes the host wait for the device.

    Two things differ from that code. The original casts activations to float32; here they keep the precision that all
    variants use. The gate is that of equation 4, which is not renormalised over the chosen experts.

    Returns:
        [T, m], in the dtype of the experts' outputs.
    """
    gate_TN = torch.ones_like(x_Tn[:, :1]) if routing is None else routing.gate
    y_Tm: Tensor | None = None
    for t, (down_rn, up_rm) in enumerate(zip(factors.down(), factors.up(), strict=True)):
        (token,) = torch.where(gate_TN[:, t] != 0)
        out = (x_Tn[token] @ down_rn.T @ up_rm) * scaling
        if y_Tm is None:
            y_Tm = out.new_zeros(len(x_Tn), out.shape[1])
        y_Tm.index_add_(0, token, out * gate_TN[token, t, None].to(out.dtype))
    assert y_Tm is not None, "an adapter has at least one expert"
    return y_Tm
