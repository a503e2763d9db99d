"""Errors that command lines report in one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Raised when a user's request cannot be met.

    The message says what is wrong, where, and what to do. Command lines print it and exit with code 2.
    """


class DataError(UserError):
    """Raised when a data file is missing or broken.

    The message names the file and, for a broken record, its number or line.
    """


def unknown_name(what: str, value: str, choices: Iterable[str]) -> str:
    """Return an error message for a name that does not exist: the nearest name, then all names.

    Args:
        what: What the names stand for.
        value: The name that was given.
        choices: The names that exist.
    """
    names = list(choices)
    spellings: dict[str, str] = {}
    for name in names:  # "piqa" is near to "intra/piqa"
        spellings.setdefault(name.rpartition("/")[2].casefold(), name)
    spellings |= {name.casefold(): name for name in names}
    near = difflib.get_close_matches(value.casefold(), spellings, n=1)
    suggestion = f"; did you mean {spellings[near[0]]!r}? There are " if near else "; there are "
    return f"unknown {what} {value!r}{suggestion}{', '.join(names)}"
