"""Make Triton's interpreter faster.

The interpreter replaces the functions of `triton.language` before each kernel and before each call of one kernel
function by another, and searches the whole module for them each time. That took 40% of the time of our kernels' tests.
The replacements are always the same, so they are made once and stay. Nothing else uses `triton.language` in a process
that interprets.
"""

from typing import Any


class _NothingToRestore:
    def restore(self) -> None:
        """Keep the replacements."""


def make_interpreter_faster() -> None:
    """Let the interpreter replace the functions of `triton.language` once per module that a kernel sees."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # the tests of kernels are skipped
        return
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # another version of Triton, which may be as slow as it likes
        return
    done: set[frozenset[str]] = set()

    def patch_once(function: Any) -> _NothingToRestore:
        seen = frozenset(
            module.__name__ for module in (tl, tl.core) if any(v is module for v in function.__globals__.values())
        )
        if seen not in done:
            patch(function)
            done.add(seen)
        return _NothingToRestore()

    interpreter._patch_lang = patch_once
