"""Run the speed benchmark: `python -m bench.speed`."""

import sys

from bench.speed.cli import main

if __name__ == "__main__":
    sys.exit(main())
