"""Run code of the harness in two processes that train together.

`accelerate launch --cpu` starts one process whatever it is told, so torchrun starts these. Every process fails unless
there are two of them.
"""

import os
import subprocess
import sys

from bench.records import provenance
from bench.runtime.processes import processes

COUNT = 2


def run_module(module, *arguments):
    """Run `python -m module arguments` in two processes and return the finished launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={COUNT}", "-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=provenance.ROOT,
        env=environment,
        timeout=300,
    )


def run_bench(*arguments):
    """Run `python -m bench arguments` in two processes."""
    return run_module(__name__, *arguments)


def require_two():
    """Fail unless this is one of two processes, and return its number."""
    state = processes()
    assert state.num_processes == COUNT, state
    return state.process_index


if __name__ == "__main__":
    from bench.cli.parser import main  # trainings alone do not need what the commands import

    require_two()
    sys.exit(main())
