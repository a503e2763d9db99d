"""The report's figures, as SVG to stand inside a page. Pure: the same records give the same bytes.

Text and axes take the page's own colour and font, so that a figure reads in the dark as in the light. A method has its
colour and its marker everywhere, and a mark leads to the records that it is made of.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from bench.experiments.methods import BASE
from bench.records.schema import Record, SpeedRecord
from bench.report.scores.selection import TableRow
from bench.report.speed.summary import seconds

# After Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which the colour-blind can tell apart; those too
# light for a white page or too dark for a black one are moved a little. The markers say it again.
STYLES: dict[str, tuple[str, str]] = {
    BASE: ("#808080", "X"), "lora": ("#1a7fc0", "o"), "asylora": ("#5cb0dd", "h"), "dora": ("#009e73", "s"),
    "molora": ("#dd9500", "^"), "moasylora": ("#8a7a00", "v"), "malora": ("#d6501c", "D"),
    "malora-small": ("#c76a9b", "d"),
}  # fmt: skip
GLYPHS = {"X": "✕", "o": "●", "h": "⬢", "s": "■", "^": "▲", "v": "▼", "D": "◆", "d": "♦", "P": "✚"}
INK, RULE = "#010203", "#040506"  # stand for the page's own
RC = {
    "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": RULE, "axes.edgecolor": RULE, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.3,
    "figure.constrained_layout.use": True,
}  # fmt: skip


class Line(NamedTuple):
    method: str
    xs: list[float]
    ys: list[float]
    record: Record


def style(method: str) -> tuple[str, str]:
    """Colour and marker; a variant has its family's colour."""
    return STYLES.get(method) or (STYLES.get(method.partition("-")[0], STYLES[BASE])[0], "P")


def handle(id: str) -> str:
    """What the page knows a record by: the hash at the end of its id. Ids are long, and every cell leads to some."""
    return id.rpartition("-")[2]


def link(ids: Iterable[str]) -> str:
    """Where the page shows these records."""
    return "#" + ",".join(map(handle, ids))


def _draw(title: str, *panels: Callable[[Axes], None], height: float = 2.7) -> str:
    """Panels one above the other that share their x axis; the title is for those who do not see the figure."""
    with matplotlib.rc_context({**RC, "svg.hashsalt": title}):
        figure = Figure((4.4, height))
        for panel, axes in zip(panels, figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], strict=True):
            panel(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure, and nothing refers to them
    svg = re.sub(r' (?:d|x|y|transform|points)="[^"]*"', lambda place: _rounded(place[0]), svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _rounded(places: str) -> str:
    """To a hundredth of a point; matplotlib writes six digits, a third of a figure."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", places)


def means(
    title: str, label: str, found: list[TableRow], x: Callable[[TableRow], float | None], unit: str | None = "",
    series: Callable[[TableRow], str] | None = None,
) -> str | None:  # fmt: skip
    """Each row's mean, with its interval, against something of the row; None where that is known of none.

    A line joins the rows of a method, or those of a series, which has its name at the line's end.
    """
    known = [(x(row), row) for row in found if row.records and x(row) is not None]
    joined: dict[Any, list[tuple[float, float]]] = {}

    def panel(axes: Axes) -> None:
        for at, row in sorted(known, key=lambda one: one[0]):
            (colour, marker), mean = style(row.method), row.mean
            axes.errorbar(at, mean.value, mean.half_width, color=colour, elinewidth=1.2)
            axes.scatter(at, mean.value, 40, colour, marker=marker, urls=[link(r.id for r in row.sources)], zorder=3)
            line = joined.setdefault((series(row) if series else "", row.method, row.entry.single_task), [])
            line.append((at, mean.value))
        for (name, method, _), points in joined.items():
            axes.plot(*zip(*points, strict=True), color=style(method)[0], alpha=0.6)
            axes.annotate(name, points[-1], (8, 0), textcoords="offset points", va="center")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if unit is not None:
            axes.xaxis.set_major_formatter(EngFormatter(unit, sep=" " if unit else ""))
        axes.margins(x=0.12)
        axes.set(xlabel=label, ylabel="mean, %")

    return _draw(title, panel) if known else None


def lines(title: str, label: str, panels: dict[str, list[Line]], scale: str = "linear") -> str | None:
    """Lines in panels, by what their y axis says."""

    def panel(name: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for method, xs, ys, record in panels[name]:
                axes.plot(xs, ys, color=style(method)[0], alpha=0.85, url=link([record.id]))
            axes.set(ylabel=name, xlabel=label if name == list(panels)[-1] else "", yscale=scale)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # steps, layers, places in a list
            if scale == "log":
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")

        return draw

    return _draw(title, *map(panel, panels), height=1.5 + 1.2 * len(panels)) if any(panels.values()) else None


def heat(title: str, label: str, columns: dict[Any, Sequence[float]]) -> str:
    """A number for each decoder layer, downwards, and column."""

    def panel(axes: Axes) -> None:
        values = np.array(list(columns.values())).T
        mesh = axes.pcolormesh(values, cmap="cividis")
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=7)
        layers = np.arange(0, len(values), max(1, len(values) // 6))
        axes.set_yticks(layers + 0.5, layers)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(xlabel=label, ylabel="layer")
        axes.figure.colorbar(mesh).outline.set_visible(False)

    return _draw(title, panel, height=3.2)


def alike(title: str, readings: dict[tuple[str, str, str], list[tuple[Record, float, float]]]) -> str | None:
    """Similarity of experts by side and setting, and that of random ones: Figure 2."""
    compared = sorted({(side, setting) for _, setting, side in readings})

    def panel(axes: Axes) -> None:
        for (method, setting, side), found in readings.items():
            at, (colour, marker) = compared.index((side, setting)), style(method)
            for record, value, chance in found:
                axes.scatter(value, at, 30, colour, marker=marker, urls=[link([record.id])], zorder=3)
                axes.scatter(chance, at, 90, INK, marker="|")
        axes.set_yticks(range(len(compared)), [f"{side}, {setting}" for side, setting in compared])
        axes.invert_yaxis()
        axes.set(xlabel="mean correlation; a bar is chance", xlim=(0, None))

    return _draw(title, panel, height=0.8 + 0.3 * len(compared)) if compared else None


def steps(title: str, record: SpeedRecord) -> str | None:
    """Seconds of a step by variant, median and quartiles: Figure 4c."""
    rows = sorted((row for row in record.rows if seconds(row) is not None), key=seconds, reverse=True)

    def panel(axes: Axes) -> None:
        for at, row in enumerate(rows):
            colour = style((row.method or BASE).removeprefix("peft-"))[0]
            axes.barh(at, seconds(row), color=colour, height=0.65, url=link([record.id]))
            axes.plot(np.quantile(row.seconds["step"], (0.25, 0.75)), (at, at), color=INK)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter("s"))

    return _draw(title, panel, height=0.6 + 0.2 * len(rows)) if rows else None
