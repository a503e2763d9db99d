"""Rotary position embedding of attention modules: one kernel each way instead of about ten.

The forward of an attention module finds `apply_rotary_pos_emb` among the globals of its file. transformers can exchange
such a function only for the whole process. Here the forward of one module runs the same code with globals of its own,
in which this name means our function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from malora.backbone.probe import can_run, exact_on_cpu, is_close, numbers, result_of

_NAME = "apply_rotary_pos_emb"


@dataclass
class RotarySettings:
    """Nothing: the class of the module has its function."""


def settings(module: nn.Module) -> RotarySettings | None:
    """Return settings if a module's forward rotates queries and keys by halves; else None."""
    function = _rotary_of(type(module).forward)
    return RotarySettings() if function is not None and _rotates_halves(function) else None


def _innermost(function: Any) -> Any:
    """Return the function that decorators with `functools.wraps` are around."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _rotary_of(forward: Any) -> Callable[..., Any] | None:
    """Return the function that a forward applies by the name `apply_rotary_pos_emb`."""
    function = _innermost(forward)
    uses_it = isinstance(function, FunctionType) and _NAME in function.__code__.co_names
    return function.__globals__.get(_NAME) if uses_it else None


def _rotates_halves(function: Callable[..., Any]) -> bool:
    """Return whether a function computes what the kernel computes, for all or a part of each head's columns."""
    q, k = numbers(2, 3, 5, 8), numbers(2, 1, 5, 8)
    cos, sin = numbers(2, 5, 8), numbers(2, 5, 8).flip(0)
    results = result_of(lambda: function(q, k, cos, sin))
    return isinstance(results, tuple) and len(results) == 2 and all(
        is_close(got, _rotated(x, cos, sin)) for got, x in zip(results, (q, k), strict=True)
    )  # fmt: skip


def _rotates_a_part(function: Callable[..., Any]) -> bool:
    """Return whether a function copies the columns for which there are no angles."""
    q, cos = numbers(1, 2, 3, 8), numbers(1, 3, 4)
    results = result_of(lambda: function(q, q, cos, cos))
    expected = torch.cat([_rotated(q[..., :4], cos, cos), q[..., 4:]], -1)
    return isinstance(results, tuple) and is_close(results[0], expected)


def _keeps_dtype(function: Callable[..., Any]) -> bool:
    """Return whether results in 16 bits stay so if the angles are in float32."""
    q, cos = numbers(1, 2, 3, 8).bfloat16(), numbers(1, 3, 8)
    results = result_of(lambda: function(q, q, cos, cos))
    return isinstance(results, tuple) and results[0].dtype == torch.bfloat16


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-x2, x1], -1) * sin[:, None]


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward of a class, with our function in place of the file's."""
    original = base.forward
    function = _rotary_of(original)
    assert function is not None, f"{base.__name__} has no rotary embedding"
    changed = _with_global(original, _NAME, _faster(function))

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        return changed(self, *args, **kwargs)

    return forward


def _faster(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same by the kernel where it can."""
    from malora.backbone.kernels.rotary import rotary  # needs Triton

    with exact_on_cpu():
        may_be_partial, keeps_dtype = _rotates_a_part(function), _keeps_dtype(function)

    @wraps(function)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        has_angles = cos.shape[-1] == q.shape[-1] or (cos.shape[-1] < q.shape[-1] and may_be_partial)
        has_dtype = cos.dtype == q.dtype or keeps_dtype
        if args or kwargs or not (has_angles and has_dtype and _can_rotate(q, k, cos)):
            return function(q, k, cos, sin, *args, **kwargs)
        return rotary(q, k, cos, sin)

    return apply_rotary_pos_emb


def _can_rotate(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    """Return whether the kernel takes these shapes and dtypes."""
    if not (can_run(q) and q.dtype == k.dtype and q.dim() == k.dim() == 4 and cos.dim() == 3):
        return False
    return not cos.requires_grad and cos.device == q.device and len(cos) in (1, len(q))


def _with_global(function: Any, name: str, value: Any) -> Any:
    """Return a function whose innermost code finds `value` by a global name.

    Decorators around it are kept. They hold the function that they wrap in a cell of their closure.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        closure, scope = function.__closure__, {**function.__globals__, name: value}
    else:
        replaced = _with_global(inner, name, value)
        closure = tuple(CellType(replaced) if _holds(cell, inner) else cell for cell in function.__closure__ or ())
        scope = function.__globals__
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    return made


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False
