"""Run Python code in a process where Triton compiles.

The code is the first argument. Triton chooses between interpreting and compiling when a kernel is defined, so all that
has kernels is imported again.
"""

import os
import re
import sys

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    with_kernels = r"(triton(?!\._C)|malora\.fused\.kernels|tests\.malora\.fused\.hopper)(\.|$)"
    for name in filter(re.compile(with_kernels).match, list(sys.modules)):  # an extension, _C, is initialized only once
        del sys.modules[name]
    exec(sys.argv[1], {"__name__": "code"})
