"""Draw Figure 4c: seconds of a step by variant, as an SVG bar chart.

The SVG is written by hand, so that its bytes depend on the record only, not on the version of a plotting library. It
fits both a file and the HTML report: text is `currentColor`, and the report's style sheet hides the white background.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from bench.experiments.methods import BASE
from bench.records.speed_schema import SpeedRecord
from bench.report.method_styles import style
from bench.report.paper import paper
from bench.report.speed.summary import rows_by_seconds

NAMES_WIDTH, WIDTH, TITLE_HEIGHT, BAR_HEIGHT = 220, 780, 40, 20  # pixels
LABEL_WIDTH = 70  # pixels that the longest bar leaves for its number


class Bar(NamedTuple):
    """A bar of the chart; `quartiles` are of its samples, if there are several."""

    name: str
    seconds: float
    colour: str
    quartiles: tuple[float, float] | None = None


def figure4c(record: SpeedRecord) -> str:
    """Return the figure of a training record as a file.

    The paper's steps are below, on a scale of their own.
    """
    table = paper()["table10"]
    theirs = [Bar(name, row["step_s"], style(name.lower())[0]) for name, row in table.items()]
    theirs.sort(key=lambda bar: -bar.seconds)
    title = f"Seconds of a training step, {record.shape}, {record.provenance.device}"
    return _svg("Figure 4c", [(title, _bars(record)), (f"The paper's: {paper()['table10_source']}", theirs)]) + "\n"


def step_figure(title: str, record: SpeedRecord, link: str) -> str | None:
    """Return the record's bars for the HTML report, linked to the record.

    Returns None if no row ran.
    """
    bars = _bars(record)
    return _svg(title, [("", bars)], link) if bars else None


def _bars(record: SpeedRecord) -> list[Bar]:
    return [
        Bar(
            row.name,
            step,
            style((row.method or BASE).removeprefix("peft-"))[0],
            tuple(np.quantile(row.seconds["step"], (0.25, 0.75)).tolist()),
        )
        for step, row in rows_by_seconds(record)
    ]


def _svg(label: str, charts: Sequence[tuple[str, list[Bar]]], link: str = "") -> str:
    """Stack charts, each with a title unless that is empty."""
    parts, y = [], 0
    for title, bars in charts:
        if title:
            parts.append(f'<text x="8" y="{y + 18}" font-weight="bold">{escape(title)}</text>')
            y += TITLE_HEIGHT - 10
        drawn = _draw_bars(bars, y)
        parts += [f'<a xlink:href="{escape(link)}">', *drawn, "</a>"] if link else drawn
        y += 10 + BAR_HEIGHT * len(bars)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        'font-family="sans-serif" font-size="12" fill="currentColor">'
    )
    background = '<rect class="background" width="100%" height="100%" fill="white"/>'
    return "\n".join([head, background, *parts, "</svg>"])


def _draw_bars(bars: list[Bar], top: int) -> list[str]:
    """Draw bars, the first of which is the longest and fills the width."""
    scale = (WIDTH - NAMES_WIDTH - LABEL_WIDTH) / bars[0].seconds
    parts = []
    for place, bar in enumerate(bars):
        y, width = top + place * BAR_HEIGHT, bar.seconds * scale
        parts += [
            f'<text x="{NAMES_WIDTH - 6}" y="{y + 13}" text-anchor="end">{escape(bar.name)}</text>',
            f'<rect x="{NAMES_WIDTH}" y="{y + 2}" width="{width:.1f}" height="{BAR_HEIGHT - 5}" fill="{bar.colour}"/>',
        ]
        end = width
        if bar.quartiles:
            low, high = (NAMES_WIDTH + quartile * scale for quartile in bar.quartiles)
            parts.append(f'<path d="M{low:.1f} {y + 9.5}H{high:.1f}" stroke="currentColor"/>')
            end = max(end, high - NAMES_WIDTH)
        parts.append(f'<text x="{NAMES_WIDTH + end + 5:.1f}" y="{y + 13}">{bar.seconds:.3g}</text>')
    return parts
