"""Look for regressions: `python -m bench.regress`."""

import sys

from bench.regress.cli import main

if __name__ == "__main__":
    sys.exit(main())
