"""Markdown tables, the numbers in them, and texts of records, which may hold anything.

`text` and `code` are for what a record holds, such as the name of a device. `table` keeps every cell in its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

ZERO = 1e-9  # below this a value is float64's rounding


def table(body: Sequence[Sequence[object]], head: Sequence[str], align: Sequence[str] | None = None) -> str:
    """Return a Markdown table.

    Args:
        body: Cells by row.
        head: Title of each column.
        align: "left" or "right" for each column; left by default.
    """
    cells = [[inline(cell) for cell in row] for row in body]
    return str(tabulate(cells, [inline(cell) for cell in head], tablefmt="pipe", disable_numparse=True, colalign=align))


def text(value: object) -> str:
    """Return a text on one line that shows itself: no markup, no HTML and no marker of a block."""
    escaped = re.sub(r"[\\`*\[\]|]", r"\\\g<0>", one_line(value))
    return escaped.replace("&", "&amp;").replace("<", "&lt;") if "<" in escaped else escaped


def code(value: object) -> str:
    """Return a text as code on one line. A backtick would end it, and becomes an apostrophe."""
    return f"`{without_comments(_printable(value).replace('`', chr(39)))}`"


def one_line(value: object) -> str:
    """Return a text with one space between words, and no line breaks."""
    return " ".join(_printable(value).split())


def _printable(value: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(value))


def without_comments(text: str) -> str:
    """Return Markdown in which no comment begins. The README's blocks end at one."""
    return text.replace("<!--", "<! --")


def inline(value: object) -> object:
    """Return Markdown on one line without what ends a cell of a table, and without HTML outside code."""
    if not isinstance(value, str):
        return value
    pieces = re.split(r"(`[^`]*`)", re.sub(r"(?<!\\)\|", r"\\|", re.sub(r"[\r\n\v\f\x85\u2028\u2029]+", " ", value)))
    pieces[::2] = [re.sub(r"<(?=[A-Za-z/!?])", "&lt;", piece) for piece in pieces[::2]]
    return without_comments("".join(pieces))


def number(value: float | None, digits: int = 3) -> str:
    """Return a value with this many significant digits, or an empty cell for None."""
    if value is None:
        return ""
    return f"{0 if abs(value) < ZERO else value:.{digits}g}"
