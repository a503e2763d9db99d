"""Launch of a Triton kernel at a small cost on the host.

`kernel[grid](...)` binds the arguments, specializes each of them and looks for the compiled kernel in every call, which
takes longer than many of these kernels run. `launch` remembers which compiled kernel belongs to such arguments, and
calls that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

MAX_REMEMBERED = 1 << 14  # bounds the memory if lengths keep changing

# Compiled kernel and constants of a launch, by its kernel, device, arguments and constants.
_remembered: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Do what `kernel[grid](*args, **constants)` does.

    Args:
        kernel: A function under `triton.jit`.
        grid: Number of programs, in up to three dimensions.
        args: The kernel's first parameters: tensors, numbers, None, and tuples of them.
        constants: The compile-time constants, which are its other parameters, and launch options such as `num_warps`.
    """
    if not isinstance(kernel, triton.JITFunction):  # the interpreter
        kernel[grid](*args, **constants)
        return
    key = (id(kernel), torch.cuda.current_device(), *map(_specialization, args), *constants.values())
    found = _remembered.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        if len(_remembered) >= MAX_REMEMBERED:
            _remembered.clear()
        _remembered[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, tail = found
    compiled[(*grid, 1, 1)[:3]](*args, *tail)


def _specialization(arg: Any) -> Any:
    """Return all of an argument that Triton compiles into a kernel.

    That is less of a number than its value, but a launch has few different ones.
    """
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16
    return tuple(map(_specialization, arg)) if isinstance(arg, tuple) else arg
