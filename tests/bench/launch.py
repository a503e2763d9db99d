"""Run code of the harness in two processes that train together.

Every process fails unless there are two of them.
"""

import subprocess
import sys
from typing import Any

from bench.runtime.processes import processes
from tests.processes import run

COUNT = 2


def run_module(module: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in two processes, with the options of `tests.processes.run`."""
    return run(module, *arguments, count=COUNT, **options)


def run_bench(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m bench arguments` in two processes."""
    return run_module(__name__, *arguments, **options)


def require_two():
    """Fail unless this is one of two processes, and return its number."""
    state = processes()
    assert state.num_processes == COUNT, state
    return state.process_index


if __name__ == "__main__":
    from bench.cli.parser import main  # trainings alone do not need what the commands import

    require_two()
    sys.exit(main())
