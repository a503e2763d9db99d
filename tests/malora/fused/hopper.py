"""Compilation of kernels for Hopper.

It needs no GPU, and runs in a process where Triton does not interpret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from malora.fused.kernels import tiling
from tests import processes


def compile_for_hopper(
    kernel: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, Any] | None = None,
    aligned: Iterable[str] = (),
    **options: int,
) -> str:
    """Return the kernel's Triton GPU IR (TTGIR).

    Assert that the kernel fits into an H100's shared memory.
    Pointers are those of bfloat16 and divisible by 16, numbers are int32, strides are multiples of 16.

    Args:
        kernel: A `triton.jit` function.
        constants: Compile-time values by argument name. None stands for a missing tensor. Names that the kernel does
            not have are ignored.
        types: Types by argument name, of pointers that are not to bfloat16 and of tuples of pointers.
        aligned: Names of further numbers that are multiples of 16.
        options: Launch options, such as `num_warps`.
    """
    import triton

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = dict(types or {}) | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names}
    places = [
        (i, *place)
        for i, name in enumerate(names)
        if "ptr" in name or name.endswith("_stride") or name in aligned
        for place in ([(j,) for j in range(len(signature[name]))] if isinstance(signature[name], tuple) else [()])
    ]
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for place in places},
    )
    backend = triton.backends.backends["nvidia"].compiler
    with patch.multiple(backend, make_ptx=_make_no_ptx, make_cubin=lambda *arguments: b""):
        made = triton.compile(source, triton.backends.compiler.GPUTarget("cuda", 90, 32), options)
    assert made.metadata.shared <= tiling.HOPPER_SHARED_BYTES, (kernel.__name__, constants, made.metadata.shared)
    return str(made.asm["ttgir"])


def _make_no_ptx(backend: Any, source: Any, metadata: dict[str, Any], *others: Any) -> str:
    """Replace the last stages of the compilation, which take a third of its time and change neither TTGIR nor sizes."""
    metadata["name"] = "kernel"
    return ""


def unfinished_matmuls(ttgir: str) -> list[int]:
    """Return how many asynchronous matmuls an iteration leaves unfinished.

    There is one number for each innermost loop with asynchronous matmuls.
    """
    found: list[int] = []
    regions: list[list[int] | None] = []  # a stack: of a loop [matmuls started, matmuls unfinished], else None
    for line in map(str.strip, ttgir.splitlines()):
        loop = next(filter(None, reversed(regions)), None)
        if line.startswith("}") and (closed := regions.pop()) and closed[0]:
            found.append(closed[1])
        elif loop and "ttng.warp_group_dot " in line:
            loop[:] = loop[0] + 1, loop[1] + 1
        elif loop and (wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line)):
            loop[1] = min(loop[1], int(wait[1]))
        if line.endswith("{"):
            regions.append([0, 0] if "scf.for" in line else None)
    assert not regions
    return found


def run_compile_script(code: str, cache: Path) -> list[str]:
    """Run Python code in a process where Triton compiles, and return its output.

    The output is what the code prints, split at form feeds.

    Args:
        code: Source text that ends each output with a form feed.
        cache: Folder for compiled kernels.
    """
    done = processes.run("tests.malora.fused.compile_script", code, environment={"TRITON_CACHE_DIR": str(cache)})
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\f")[:-1]
