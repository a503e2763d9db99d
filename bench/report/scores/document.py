"""Sections of a generated page.

Those with rows know them, so that the HTML report can link to their records.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.report import markdown
from bench.report.scores.selection import TableRow


@dataclass(frozen=True)
class Leaderboard:
    """A leaderboard. As a string it is Markdown.

    Attributes:
        lines: Cells by line, with the row that they show; None for the paper's own figures.
    """

    head: list[str]
    lines: list[tuple[TableRow | None, list[str]]]
    notes: str

    @property
    def rows(self) -> list[TableRow]:
        """Our rows, without the paper's."""
        return [row for row, _ in self.lines if row]

    def __str__(self) -> str:
        align = ["left", *["right"] * (len(self.head) - 2), "left"]
        return f"{markdown.table([cells for _, cells in self.lines], self.head, align)}\n\n{self.notes}"


@dataclass(frozen=True)
class AdapterSection:
    """The analysis of trained adapters, in Markdown."""

    text: str
    rows: list[TableRow]

    def __str__(self) -> str:
        return self.text


Section = str | Leaderboard | AdapterSection


def render_page(sections: list[Section]) -> str:
    """Return a page as Markdown."""
    return "\n\n".join(map(str, sections)) + "\n"
