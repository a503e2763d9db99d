"""Run the command line: `python -m bench.teachers`."""

import sys

from bench.teachers.cli import main

if __name__ == "__main__":
    sys.exit(main())
