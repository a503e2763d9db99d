"""Help format, parser and argument types of the command lines."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from bench.errors import UserError, unknown_name

MAX_COUNT = 1_000_000_000
MAX_SEED = 10**18 - 1
MAX_NAME_BYTES = 255  # of a file, on all common file systems
MAX_PATH_BYTES = 4000  # Linux has 4,096, and names of files are added
MAX_SHOWN = 60


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A help formatter that adds an option's default, and keeps the lines of descriptions.

    It adds no default that is None, False or empty.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, [], ()) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose help opens with a sentence and an example.

    For a command that does not exist it suggests the nearest one.

    Args:
        text: What the command does, in a sentence.
        example: A command line to try; more than one are separated by line breaks.
        options: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, *, text: str = "", example: str = "", **options: Any) -> None:
        examples = "\n".join(f"  {line}" for line in example.splitlines())
        description = f"{text}\n\nexample:\n{examples}" if example else text
        # All options in the usage would fill the screen before the first sentence.
        options.setdefault("usage", "%(prog)s [options]")
        super().__init__(description=description, formatter_class=Help, **options)
        self.text, self.example = text, example

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a value that must be one of an action's choices."""
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else "name"
            raise argparse.ArgumentError(None, unknown_name(what, value, action.choices))


def one_of(what: str, choices: Collection[str]) -> Callable[[str], str]:
    """Return an argument type that accepts some names.

    Args:
        what: What the names stand for, for the error message.
        choices: The names.
    """

    def check(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(unknown_name(what, value, choices))
        return value

    return check


def positive(value: str) -> int:
    """Parse a whole number from 1 to MAX_COUNT."""
    number = int(value) if value.isdecimal() and len(value) <= len(str(MAX_COUNT)) else 0
    if not 1 <= number <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{short(value)} is not a whole number from 1 to {MAX_COUNT:,}")
    return number


def number_from(lowest: float, highest: float, *, above: bool = False) -> Callable[[str], float]:
    """Return an argument type for numbers in a range.

    Args:
        lowest: The lowest number.
        highest: The highest one.
        above: Whether the lowest one is excluded.
    """

    def check(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not lowest <= number <= highest or (above and number == lowest):
            between = f"above {lowest:g}, and at most {highest:g}" if above else f"from {lowest:g} to {highest:g}"
            raise argparse.ArgumentTypeError(f"{short(value)} must be a number {between}")
        return number

    return check


def seed_number(value: str) -> int:
    """Parse a seed, which PyTorch stores in 64 bits."""
    try:
        number = int(value)
    except ValueError:
        number = MAX_SEED + 1
    if abs(number) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{short(value)} is not a whole number of at most 18 digits")
    return number


def file_path(value: str) -> Path:
    """Parse the path of a file or folder that a file system can have."""
    if "\0" in value or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in value.split("/")):
        raise argparse.ArgumentTypeError(
            f"{short(value)} is not the name of a file, which has at most {MAX_NAME_BYTES} bytes and no null"
        )
    if len(os.fsencode(value)) > MAX_PATH_BYTES:
        raise argparse.ArgumentTypeError(f"{short(value)} is longer than {MAX_PATH_BYTES} bytes")
    return Path(value)


def file_name(value: str) -> str:
    """Parse a name that may be that of a file; see `file_path`."""
    file_path(value)
    return value


def folder(value: str) -> Path:
    """Parse the path of a folder."""
    if not value:
        raise argparse.ArgumentTypeError("'' is not the name of a folder; write . for the current folder")
    if "://" in value:
        raise argparse.ArgumentTypeError(
            f"{short(value)} is a URL, and results need a folder: they are written by atomic renaming, which object "
            "storage lacks. For several machines name a folder that they all mount, or see --storage of --engine ray"
        )
    return file_path(value)


def storage_url(value: str) -> str:
    """Parse a URL of storage; `bench.records.remote.open_remote` checks it."""
    if "://" not in value or not value.isprintable():
        raise argparse.ArgumentTypeError(
            f"{short(value)} is not a URL such as s3://bucket/results; name a folder that all mount as --results"
        )
    return file_name(value)


def short(value: str) -> str:
    """Return a value as Python writes it, at most 60 characters of it."""
    text = ascii(value) if not value.isprintable() else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(value)} characters)"


def require_folder(option: str, path: Path) -> None:
    """Check that a path is a folder to write to, or that one can be made there. Nothing is made.

    Args:
        option: The option that named it, for the message.
        path: The path.

    Raises:
        UserError: It is a file, is below one, may not be written to, or is no name for a folder.
    """
    if long := next((part for part in path.parts if len(os.fsencode(part)) > MAX_NAME_BYTES), None):
        raise UserError(f"{option}: the name {long[:20]}... has over {MAX_NAME_BYTES} bytes; name another folder.")
    first = next(one for one in (path, *path.absolute().parents) if one.exists() or one.is_symlink())
    if not first.is_dir():
        what = "a file" if first == path else f"below {first}, which is a file"
        raise UserError(f"{option} {path} is {what}; name a folder.")
    if not os.access(first, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path} cannot be written to; name another folder.")


def fraction(value: str) -> float:
    """Parse a number that is at least 0 and below 1."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{short(value)} must be at least 0 and below 1")
    return number
