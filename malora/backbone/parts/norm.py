"""RMSNorm modules: one kernel each way instead of six.

A module is one if it computes √n · x / |x| ⊙ (w + o) with a weight w and o = 0 or 1, whatever its class is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora.backbone.probe import bare_copy, can_run, is_close, numbers, result_of


class Precomputed(NamedTuple):
    """Output of a norm for a tensor at a version, computed together with that tensor."""

    of: Tensor
    version: int | None
    y: Tensor

    def fits(self, x: Tensor) -> bool:
        """Return whether y is the norm of x.

        A reentrant checkpoint runs without gradients first. What was computed in it has no graph, but its output has.
        """
        return self.of is x and self.version == version_of(x) and self.y.requires_grad == x.requires_grad


@dataclass
class NormSettings:
    """What the forward pass of a norm needs to know.

    Attributes:
        eps: Added to the mean square.
        offset: Added to the weight.
        precomputed: The output, if the layer before has computed it already. It is used once.
    """

    eps: float
    offset: float
    precomputed: Precomputed | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what waits to be used: a copy of the model has not computed it."""
        return vars(self) | {"precomputed": None}


def settings(module: nn.Module) -> NormSettings | None:
    """Return the settings of an RMSNorm; None if the module is something else."""
    own = module._parameters.get("weight")
    if len(module._parameters) != 1 or own is None or own.dim() != 1 or module._modules:
        return None
    eps = next((vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)), None)
    if not isinstance(eps, float):
        return None
    x, weight = numbers(3, 8), numbers(8)
    probed = result_of(lambda: bare_copy(module, {}, weight).forward(x))
    # A small input shows where eps is added.
    small = result_of(lambda: bare_copy(module, {}, weight).forward(x * 1e-3))
    for offset in (0.0, 1.0):
        both = (F.rms_norm(scaled, (8,), weight + offset, eps) for scaled in (x, x * 1e-3))
        if all(is_close(got, expected) for got, expected in zip((probed, small), both, strict=True)):
            return NormSettings(eps, offset)
    return None


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward that uses the kernel where it can."""
    from malora.backbone.kernels.rms_norm import rms_norm  # needs Triton

    original = base.forward

    @wraps(original)
    def forward(self: Any, *inputs: Tensor, **named: Any) -> Any:
        if named or torch.compiler.is_compiling():  # inductor fuses a norm with what is around it
            return original(self, *inputs, **named)
        (x,) = inputs
        own: NormSettings = self.malora_settings
        if (precomputed := own.precomputed) is not None:
            own.precomputed = None
            if precomputed.fits(x):
                return precomputed.y
        if can_fuse(self, x):
            return rms_norm(x, self.weight, own.eps, own.offset)
        return original(self, x)

    return forward


def can_fuse(norm: Any, x: Tensor) -> bool:
    """Return whether a kernel can compute this norm of x. It computes no gradient of the weight."""
    weight = norm.weight
    is_trained = weight.requires_grad and torch.is_grad_enabled()
    return not is_trained and weight.dtype == x.dtype and weight.device == x.device and can_run(x)


def version_of(x: Tensor) -> int | None:
    """Return the version of a tensor, which changes in place; None in inference mode, where it has none."""
    return None if x.is_inference() else x._version
