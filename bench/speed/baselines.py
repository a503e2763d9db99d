"""Baselines that other projects' code stands for.

- `loop` computes a mixture of LoRA experts as published code does. `malora` itself does not offer it: `MaloraConfig`
  accepts it only inside `registered_baselines()`.
- `LigerKernels` runs a model with Liger's kernels as Liger recommends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn

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


class LigerKernels:
    """Liger's kernels in one model, out of the box, while it runs inside `with`.

    Liger's loss is used too. It saves memory and makes the host wait. Liger patches names in the transformers module of
    a model's code, for the whole process. That would also affect other models that must run without Liger. So these
    patches are active only inside `with`. A model that Liger does not know stays as it is.

    Args:
        model: The base model.

    Raises:
        ImportError: liger-kernel is not installed.
    """

    def __init__(self, model: nn.Module) -> None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        self.names = vars(sys.modules[type(model).__module__])
        before = dict(self.names)
        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=True, cross_entropy=False)
        # torch.compile adds names of its own in between, which are not to be put back.
        self.before = {name: value for name, value in before.items() if self.names[name] is not value}
        self.ligers = {name: self.names[name] for name in self.before}
        self.__exit__()

    def __enter__(self) -> None:
        self.names.update(self.ligers)

    def __exit__(self, *_: object) -> None:
        self.names.update(self.before)


def has_liger() -> bool:
    """Return whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None
