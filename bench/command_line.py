"""What the command lines share: a help that shows defaults, and checks of single values."""

from __future__ import annotations

import argparse
from pathlib import Path


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows an option's default unless there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def one_of(what: str, choices) -> type:
    def check(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"unknown {what} {value!r}; there are {', '.join(choices)}")
        return value

    return check


def positive(value: str) -> int:
    if not (value.isdecimal() and int(value) > 0):
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from 1")
    return int(value)


def folder(value: str) -> Path:
    if not value:
        raise argparse.ArgumentTypeError("'' names no folder; for the current one write .")
    return Path(value)


def fraction(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number from 0 to below 1")
    return number
