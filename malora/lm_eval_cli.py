"""The console script `malora-lm-eval`: lm-eval's own command line, which then loads malora's adapters.

PEFT and lm-eval have no entry points for tuners of other packages. Importing this module imports `malora`, which
registers the tuner; nothing else differs from `lm-eval`.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run lm-eval's command line on the arguments of this process.

    Exits with code 2 if lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        print("malora-lm-eval needs lm-eval: pip install 'lm-eval[hf]'.", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
