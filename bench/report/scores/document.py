"""What a page is made of: Markdown, and what knows the rows that it shows, so that another page can lead to records."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate

from bench.report.scores.selection import TableRow


@dataclass(frozen=True)
class Leaderboard:
    """A leaderboard; as a string, Markdown."""

    head: list[str]
    lines: list[tuple[TableRow | None, list[str]]]  # None: the paper's own
    notes: str

    @property
    def rows(self) -> list[TableRow]:
        return [row for row, _ in self.lines if row]

    def __str__(self) -> str:
        body, align = [cells for _, cells in self.lines], ("left", *["right"] * (len(self.head) - 2), "left")
        return f"{tabulate(body, self.head, tablefmt='pipe', disable_numparse=True, colalign=align)}\n\n{self.notes}"


@dataclass(frozen=True)
class AdapterSection:
    """What `bench.inside_report` says of rows, in Markdown."""

    text: str
    rows: list[TableRow]

    def __str__(self) -> str:
        return self.text


Section = str | Leaderboard | AdapterSection


def render_page(parts: list[Section]) -> str:
    return "\n\n".join(map(str, parts)) + "\n"
