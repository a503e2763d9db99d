"""Kernels for the frozen parts of one model: Liger's for rotary positions and SwiGLU, and torch's for norms."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LigerKernels:
    """Liger's kernels in one model, which runs inside `with`; nothing changes where Liger does not know the model.

    Liger replaces names in the module of the model's code for the whole process; other models there may be on another
    device, or are to be measured without it. So the module has Liger's names inside `with` only.
    """

    def __init__(self, model: nn.Module, as_it_comes: bool = False) -> None:
        """As it comes Liger also does the norms, and the loss, which saves memory and makes the host wait."""
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        self.names = vars(sys.modules[type(model).__module__])
        before = dict(self.names)
        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=as_it_comes, cross_entropy=False)
        if not as_it_comes:
            for module in model.modules():
                if getattr(module, "casting_mode", None) == "llama":  # a norm that Liger has taken
                    module.forward = MethodType(_rms_norm, module)
        # torch.compile adds names of its own in between; they are not Liger's to put back.
        self.before = {name: value for name, value in before.items() if self.names[name] is not value}
        self.ligers = {name: self.names[name] for name in self.before}
        self.__exit__()

    def __enter__(self) -> None:
        self.names.update(self.ligers)

    def __exit__(self, *_: object) -> None:
        self.names.update(self.before)


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm of x [..., h] by torch's kernel.

    Liger's backward pass also makes the gradient of a weight that nobody trains, most of its time at small width.
    """
    with torch.autocast(x.device.type, enabled=False):  # it would widen x to float32
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def has_liger() -> bool:
    return find_spec("liger_kernel") is not None
