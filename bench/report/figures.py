"""Figures of the HTML report, as SVG to embed in a page.

The same records give the same bytes. Text and axes take the page's own colour and font, so a figure is readable on dark
and light pages. A method has the same colour and marker everywhere, and a mark links to the records that it is computed
from.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple, Self

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from bench.records.schema import Record
from bench.report.method_styles import style
from bench.report.scores.selection import TableRow

INK, RULE = "#010203", "#040506"  # placeholders, replaced by the page's own colours
RC: dict[Any, Any] = {
    "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": RULE, "axes.edgecolor": RULE, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.3,
    "figure.constrained_layout.use": True,
}  # fmt: skip
Panel = Callable[[Axes], None]


class Line(NamedTuple):
    """A line of a figure, and the record that it is read from."""

    method: str
    xs: list[float]
    ys: list[float]
    record: Record

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]], record: Record) -> Self:
        """Return the line through these points."""
        return cls(record.config.method, [x for x, _ in points], [y for _, y in points], record)


def handle(id: str) -> str:
    """Return the hash at the end of a record's id: a short name for links."""
    return id.rpartition("-")[2]


def link(ids: Iterable[str]) -> str:
    """Return the address at which the page shows these records."""
    return "#" + ",".join(map(handle, ids))


def _draw(title: str, *panels: Panel, height: float = 2.7) -> str:
    """Draw panels one above the other, with one x axis. Screen readers read the title."""
    with matplotlib.rc_context({**RC, "svg.hashsalt": title}):
        figure = Figure((4.4, height))
        for panel, axes in zip(panels, figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], strict=True):
            panel(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids that every figure has, and that nothing refers to
    svg = re.sub(r' (?:d|x|y|transform|points)="[^"]*"', lambda place: _rounded(place[0]), svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _rounded(places: str) -> str:
    """Round to a hundredth of a point.

    The digits that matplotlib adds are a third of a figure's bytes.
    """
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", places)


def means(
    title: str, label: str, found: list[TableRow], x: Callable[[TableRow], float | None], unit: str | None = "",
    series: Callable[[TableRow], str] | None = None,
) -> str | None:  # fmt: skip
    """Draw each row's mean and interval against a property of the row.

    A line joins the rows of a method or, with `series`, the rows of a series, whose name stands at its end.

    Args:
        title: Title for screen readers.
        label: Label of the x axis.
        found: Rows to draw.
        x: The property; rows for which it is None are left out.
        unit: Unit of the x axis; None for plain numbers without a metric prefix.
        series: Name of a row's series.

    Returns:
        The SVG, or None if no row has the property.
    """
    values = ((x(row), row) for row in found if row.records)
    known = sorted(((at, row) for at, row in values if at is not None), key=lambda pair: pair[0])
    joined: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}

    def panel(axes: Axes) -> None:
        for at, row in known:
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
    """Draw lines in panels, keyed by the label of their y axis.

    Returns None if there are no lines.
    """

    def panel(name: str) -> Panel:
        def draw(axes: Axes) -> None:
            for method, xs, ys, record in panels[name]:
                axes.plot(xs, ys, color=style(method)[0], alpha=0.85, url=link([record.id]))
            axes.set(ylabel=name, xlabel=label if name == list(panels)[-1] else "", yscale=scale)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # steps, layers or indices
            if scale == "log":
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")

        return draw

    return _draw(title, *map(panel, panels), height=1.5 + 1.2 * len(panels)) if any(panels.values()) else None


def heat_map(title: str, label: str, columns: Mapping[Any, Sequence[float] | np.ndarray]) -> str:
    """Draw a heat map with decoder layers downwards."""

    def panel(axes: Axes) -> None:
        values = np.array(list(columns.values())).T
        mesh = axes.pcolormesh(values, cmap="cividis")
        axes.set_xticks(np.arange(len(columns)) + 0.5, [str(name) for name in columns], fontsize=7)
        layers = np.arange(0, len(values), max(1, len(values) // 6))
        axes.set_yticks(layers + 0.5, [str(layer) for layer in layers])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(xlabel=label, ylabel="layer")
        bar = axes.figure.colorbar(mesh)
        bar.outline.set_visible(False)

    return _draw(title, panel, height=3.2)


def similarity(title: str, readings: dict[tuple[str, str, str], list[tuple[Record, float, float]]]) -> str | None:
    """Draw the similarity of experts and that of random ones (Figure 2).

    Both are by projection and setting.

    Args:
        title: Title for screen readers.
        readings: By method, setting and projection, each run's mean correlation and its chance level.
    """
    compared = sorted({(projection, setting) for _, setting, projection in readings})

    def panel(axes: Axes) -> None:
        for (method, setting, projection), found in readings.items():
            at, (colour, marker) = compared.index((projection, setting)), style(method)
            for record, value, chance in found:
                axes.scatter(value, at, 30, colour, marker=marker, urls=[link([record.id])], zorder=3)
                axes.scatter(chance, at, 90, INK, marker="|")
        axes.set_yticks(range(len(compared)), [f"{projection}, {setting}" for projection, setting in compared])
        axes.invert_yaxis()
        axes.set(xlabel="mean correlation; a bar is chance", xlim=(0, None))

    return _draw(title, panel, height=0.8 + 0.3 * len(compared)) if compared else None
