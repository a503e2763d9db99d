"""Kernels compiled for Hopper, which needs no GPU, in a process of its own where Triton does not interpret."""

import os
import re
import subprocess
import sys

from malora.fused.kernels import tiling


def compiled(kernel, constants, types=(), aligned=(), **options):
    """Triton's intermediate code of a kernel, which fits into an H100's shared memory.

    Args:
        constants: values by name; an argument that is None is not there.
        types: by name, of pointers that are not to bfloat16, and of tuples of them. What is no pointer is an int32.
        aligned: names of numbers that are multiples of 16, as pointers and strides are.
    """
    import triton

    names, constants = kernel.arg_names, {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict(types) | dict.fromkeys(constants, "constexpr")
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
    made = triton.compile(source, triton.backends.compiler.GPUTarget("cuda", 90, 32), options)
    assert made.metadata.shared <= tiling.HOPPER_SHARED_BYTES, (kernel.__name__, constants, made.metadata.shared)
    return made.asm["ttgir"]


def products_left_running(code):
    """Of each innermost loop that has products: how many a pass leaves running that nothing in the loop waits for."""
    found, regions = [], []  # of a region its loop's [begun, running], or None
    for line in map(str.strip, code.splitlines()):
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


def printed(code, cache):
    """What Python code prints, each up to a form feed; `cache` is a folder for what it compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.split("\f")[:-1]
