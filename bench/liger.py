"""Liger's kernels for the frozen parts of one model: norms, rotary positions and SwiGLU."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from torch import nn


class LigerKernels:
    """Liger's kernels in one model, which runs inside `with`; nothing changes where Liger does not know the model.

    Liger replaces names in the module of the model's code for the whole process; other models there may be on another
    device, or are to be measured without it. So the module has Liger's names inside `with` only.
    """

    def __init__(self, model: nn.Module, with_loss: bool = False) -> None:
        """With its fused loss the model saves memory, and makes the host wait for the number of labels."""
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        self.names = vars(sys.modules[type(model).__module__])
        before = dict(self.names)
        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=with_loss, cross_entropy=False)
        # torch.compile adds names of its own in between; they are not Liger's to put back.
        self.before = {name: value for name, value in before.items() if self.names[name] is not value}
        self.ligers = {name: self.names[name] for name in self.before}
        self.__exit__()

    def __enter__(self) -> None:
        self.names.update(self.ligers)

    def __exit__(self, *_: object) -> None:
        self.names.update(self.before)


def has_liger() -> bool:
    return find_spec("liger_kernel") is not None
