"""Check the regular expressions of an adapter's config before PEFT matches them.

The time of a regular expression can grow exponentially with the name that it is matched with, `(a+)+$` for example.
Python cannot interrupt a match in every thread, so a child process tries them first, with a limit of its CPU time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from bench.errors import UserError

# Fields of PEFT's configs whose values, elements or keys PEFT takes for regular expressions.
PATTERN_FIELDS = {
    "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern",
    "target_parameters", "feedforward_modules",
}  # fmt: skip
MAX_CPU_SECONDS = 1.0  # patterns that people write take milliseconds
MAX_REASON = 200  # characters of the message of `re`
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
# PEFT matches some expressions with whole names, and others with the end of a name or a part between dots.
_SCRIPT = """
import json, re, signal, sys
seconds, patterns, names = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
for pattern in patterns:
    try:
        forms = [re.compile(form) for form in (pattern, f"(.*\\\\.)?({pattern})$", f"(^|.*\\\\.){pattern}($|\\\\..*)")]
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(f"{pattern[:60]!r} is no regular expression: {error}")
    for name in names:
        forms[0].fullmatch(name), forms[0].search(name), forms[1].match(name), forms[2].match(name)
"""


def require_fast_patterns(config: Any, model: nn.Module) -> None:
    """Check that PEFT can match the patterns of a config with the names of a model's modules.

    Args:
        config: A config of PEFT.
        model: The model to adapt.

    Raises:
        UserError: A pattern is no regular expression, or matching takes too long.
    """
    found = {field: list(_patterns(getattr(config, field, None))) for field in sorted(PATTERN_FIELDS)}
    found = {field: patterns for field, patterns in found.items() if patterns}
    if not found:
        return
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    job = json.dumps([MAX_CPU_SECONDS, [pattern for patterns in found.values() for pattern in patterns], names])
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", _SCRIPT], input=job, capture_output=True, text=True
    )
    if child.returncode:
        reason = " ".join(child.stderr.split())[:MAX_REASON] if child.returncode == 1 else "matching it takes too long"
        raise UserError(f"{', '.join(found)} of the adapter's config: {reason}; write a simpler pattern.")


def _patterns(value: object) -> Iterable[str]:
    """Return the texts in a field's value that are more than a plain name."""
    values = [value] if isinstance(value, str) else value if isinstance(value, Iterable) else ()
    return [text for text in values if isinstance(text, str) and not _PLAIN.issuperset(text)]
