"""Markdown tables and the numbers in them."""

from __future__ import annotations

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
    return str(tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=align))


def number(value: float | None, digits: int = 3) -> str:
    """Return a value with this many significant digits, or an empty cell for None."""
    if value is None:
        return ""
    return f"{0 if abs(value) < ZERO else value:.{digits}g}"
