"""Frozen weights that bitsandbytes keeps in 4 bits.

In training, the fused path dequantizes a weight for each GEMM that reads it, as bitsandbytes itself does, and frees the
copy afterwards. In inference bitsandbytes multiplies: for few tokens it has a kernel that writes no such copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Classes of bitsandbytes. A class that is derived from one may compute something else.
_CLASSES = frozenset({"Linear4bit", "LinearNF4", "LinearFP4"})


class FourBitWeight(NamedTuple):
    """A weight in 4 bits. It refers to no module, unlike the parameter of bitsandbytes.

    Attributes:
        data: the packed values.
        state: how to unpack them: bitsandbytes' `QuantState`.
    """

    data: Tensor
    state: Any

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [m, n] in new memory."""
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.data, self.state)
        return weight.to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + bias, [T, m] for x [T, n], by a kernel for few tokens where that is faster."""
        from bitsandbytes import matmul_4bit

        with torch.no_grad():  # bitsandbytes asks for it
            y: Tensor = matmul_4bit(x, self.data.t(), self.state, bias=None if bias is None else bias.to(x.dtype))
        return y


def has_four_bits(linear: nn.Module) -> bool:
    """Return whether a frozen layer is one of bitsandbytes in 4 bits."""
    kind = type(linear)
    return kind.__name__ in _CLASSES and kind.__module__.startswith("bitsandbytes.")


def reason_not_dequantized(linear: nn.Module) -> str | None:
    """Return what keeps the fused path from reading a weight in 4 bits, or None.

    The text completes the sentence "backend 'fused' cannot compute ...".
    """
    state = getattr(linear.weight, "quant_state", None)
    if torch.compiler.is_compiling():
        return "weights in 4 bits in compiled code"
    if state is None:  # the first call of the module finds it, after FSDP has moved the weight
        return "weights in 4 bits without a quantization state"
    if getattr(state, "packing_format_for_cpu", False):
        return "weights in 4 bits that an inference pass on this CPU has packed"
    return None


def matmul_dtype_of(linears: Iterable[nn.Module], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which frozen layers multiply an input of some dtype.

    A layer in 4 bits may have a 16-bit dtype of its own, in which its adapter is computed too, as under autocast.
    """
    own = (getattr(linear, "compute_dtype", None) for linear in linears if has_four_bits(linear))
    return next((found for found in own if found in (torch.bfloat16, torch.float16)), dtype)
