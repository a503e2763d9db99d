"""Run every table and figure cut short, in one process, since loading the libraries takes longer than the runs."""

import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from bench.cli.parser import main as run_bench
from bench.experiments.registry import EXPERIMENTS

SHORT = ["--profile", "tiny", "--max-steps", "5", "--max-items", "4", "--results", "results/local/ci"]


def main() -> int:
    """Run the experiments in turn and print one line for each, or the whole output of the first one that fails."""
    for name in EXPERIMENTS:
        output, start = StringIO(), time.perf_counter()
        try:
            with redirect_stdout(output), redirect_stderr(output):
                status = run_bench([name, *SHORT])
        finally:
            if sys.exc_info()[0]:
                print(output.getvalue())
        if status:
            print(output.getvalue())
            return status
        print(f"{name}: passes in {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
