"""Find out by a small computation whether a module computes what a kernel computes.

Names of classes and attributes say little: a norm may multiply before or after it rounds, a decoder layer may scale
what it adds. So a copy of the module runs on a few numbers, with small weights or stand-ins for its children, and its
outputs are compared with the formula. That also covers architectures that nobody has tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from malora.fused.availability import interprets_triton

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Result = TypeVar("Result")


def can_run(x: Tensor) -> bool:
    """Return whether a kernel can read x. It must be on the current GPU, in 16 or 32 bits, and no DTensor."""
    if type(x) is not Tensor:
        return False
    if x.is_cuda:  # Triton launches on the current device
        return x.dtype in KERNEL_DTYPES and x.get_device() == torch.cuda.current_device()
    return x.dtype in KERNEL_DTYPES and interprets_triton() and x.device.type == "cpu"


def has_own_forward(module: nn.Module) -> bool:
    """Return whether the `forward` of this instance was replaced, as accelerate's hooks do."""
    return "forward" in vars(module)


def bare_copy(module: nn.Module, children: Mapping[str, nn.Module], weight: Tensor | None = None) -> nn.Module:
    """Copy a module without its hooks, parameters and children.

    Args:
        module: What to copy. Its other attributes are shared.
        children: The children of the copy.
        weight: Its parameter `weight`, if it has one.
    """
    bare: nn.Module = nn.Module.__new__(type(module))
    nn.Module.__init__(bare)
    own = set(vars(bare)) - {"training"}
    vars(bare).update({name: value for name, value in vars(module).items() if name not in own})
    bare._modules.update(children)
    if weight is not None:
        bare._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return bare


@contextmanager
def exact_on_cpu() -> Iterator[None]:
    """Compute on the CPU, in float32 and without gradients, inside `with`, whatever the caller has set."""
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def result_of(function: Callable[[], Result]) -> Result | None:
    """Return the result of a probe. Return None if it fails, whatever the reason."""
    try:
        return function()
    except Exception:  # the module wants other inputs or children, so it is of another kind
        return None


def numbers(*shape: int) -> Tensor:
    """Return fixed numbers between -1 and 1, without touching the state of a random generator."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float32, device="cpu") * 1.7).view(shape)


def is_close(a: Any, b: Tensor) -> bool:
    """Return whether a result is the tensor that is expected."""
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.float(), b, rtol=1e-4, atol=1e-5)


class FixedLinear(nn.Module):
    """A stand-in for a linear layer, with a given weight [m, n]."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ matrixᵀ."""
        return x @ self.matrix.T
