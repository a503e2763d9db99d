"""Help format and argument types of the command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that adds an option's default.

    It adds none that is None, False or empty.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def one_of(what: str, choices: Collection[str]) -> Callable[[str], str]:
    """Return an argument type that accepts some names.

    Args:
        what: What the names stand for, for the error message.
        choices: The names.
    """

    def check(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"unknown {what} {value!r}; there are {', '.join(choices)}")
        return value

    return check


def positive(value: str) -> int:
    """Parse a whole number from 1."""
    if not (value.isdecimal() and int(value) > 0):
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from 1")
    return int(value)


def folder(value: str) -> Path:
    """Parse the path of a folder."""
    if not value:
        raise argparse.ArgumentTypeError("'' is not the name of a folder; write . for the current folder")
    return Path(value)


def fraction(value: str) -> float:
    """Parse a number that is at least 0 and below 1."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{value!r} must be at least 0 and below 1")
    return number
