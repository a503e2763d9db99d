"""Make Triton's interpreter faster.

The interpreter runs a kernel in Python, once for each program of its grid. Most of that time is bookkeeping, which has
the same result each time, so that it can be done once:

- The functions of `triton.language` are replaced before each kernel and before each call of one kernel function by
  another, and the whole module is searched for them. Here they are replaced once and stay. Nothing else uses
  `triton.language` in a process that interprets.
- The shape of every tensor is checked and wrapped number by number. Here each shape is wrapped once.
- A table of all dtypes is made whenever one is looked up. Here each dtype is looked up once.

Values are computed by Triton and NumPy as before.
"""

import math
from functools import cache
from typing import Any


class _NothingToRestore:
    def restore(self) -> None:
        """Keep the replacements."""


def make_interpreter_faster() -> None:
    """Let the interpreter do once what it does again for every tensor and every kernel."""
    try:
        import triton.language as tl
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
    except ImportError:  # the tests of kernels are skipped
        return
    if not hasattr(interpreter, "_patch_lang"):  # another version of Triton, which may be as slow as it likes
        return
    _replace_functions_once(tl, interpreter)
    _wrap_shapes_once(tl)
    _look_dtypes_up_once(tl, interpreter)
    _broadcast_only_if_needed(tl, TritonSemantic)


def _replace_functions_once(tl: Any, interpreter: Any) -> None:
    """Replace the functions of `triton.language` once per module that a kernel sees."""
    patch = interpreter._patch_lang
    done: set[tuple[bool, bool]] = set()
    checked: dict[int, tuple[Any, tuple[bool, bool]]] = {}  # the functions are kept, so that no id comes twice

    def patch_once(function: Any) -> _NothingToRestore:
        if id(function) not in checked:
            values = {id(value) for value in function.__globals__.values()}
            checked[id(function)] = function, (id(tl) in values, id(tl.core) in values)
        seen = checked[id(function)][1]
        if seen not in done:
            patch(function)
            done.add(seen)
        return _NothingToRestore()

    interpreter._patch_lang = patch_once


def _wrap_shapes_once(tl: Any) -> None:
    """Keep the checked and wrapped shapes of blocks and tensors, which nothing changes."""
    init_block = tl.core.block_type.__init__
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def init_block_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        else:
            vars(self).update(blocks[key])
            self.element_ty = element_ty

    @cache
    def wrapped(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = wrapped(tuple(type.shape.values) if type.is_block() else ())

    tl.core.block_type.__init__ = init_block_once
    tl.core.tensor.__init__ = init_tensor


def _look_dtypes_up_once(tl: Any, interpreter: Any) -> None:
    """Keep NumPy's dtype for each dtype of Triton."""
    find = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def find_once(dtype: Any) -> Any:
        name = (dtype.element_ty if isinstance(dtype, tl.core.block_type) else dtype).name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    interpreter._get_np_dtype = find_once


def _broadcast_only_if_needed(tl: Any, semantic: Any) -> None:
    """Compare the shapes of two blocks at once before looking at each of their sizes."""
    broadcast = semantic.broadcast_impl_value

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_if_needed
