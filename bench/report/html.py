"""One HTML page of all published records. The same records give the same bytes.

The page opens from the file system and loads nothing from a network. It has the generated tables, which DataTables
(distributed with itables) sorts and filters, and figures as SVG. The records are embedded, and every number links to
those that it is computed from.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import itables.options
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from bench.experiments.methods import title_of
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import Experiment
from bench.records.schema import Record
from bench.records.speed_schema import SpeedRecord
from bench.report.claims import NOTES
from bench.report.conclusions import conclusions, verdict_word
from bench.report.experiment_figures import adapter_figures, score_figures
from bench.report.figures import handle, link
from bench.report.method_styles import GLYPHS, style
from bench.report.readme import published_sections
from bench.report.scores.document import AdapterSection, Leaderboard, Section
from bench.report.speed.figure4c import step_figure
from bench.report.speed.goals import goal_table
from bench.report.speed.summary import shown
from bench.report.speed.tables import section
from bench.report.verdicts import Claim

_RANGE = Markup('<span class="range" style="color: {}; --from: {:.1f}%; --at: {:.1f}%; --to: {:.1f}%"></span>')
_VERDICT = Markup('<span data-verdict="{}">{}</span>')
_PAPER_ROW = "the paper's*"  # ends the first cell of the paper's own rows in Markdown tables


class Table(NamedTuple):
    """A table for the template; each row of cells has a CSS class."""

    head: list[str]
    rows: list[tuple[str, list[Markup]]]
    notes: str = ""


class ContentsEntry(NamedTuple):
    """An entry of the table of contents, with those below it."""

    id: str
    title: str
    entries: tuple[ContentsEntry, ...] = ()


def page(records: dict[str, list[Record]], speeds: list[SpeedRecord], claims: list[Claim]) -> str:
    """Return the page of these records, which are grouped by profile."""
    measured = shown(speeds)
    by_profile = {name: sorted(records[name], key=lambda r: r.id) for name in reversed(PROFILES) if records.get(name)}
    published = list(published_sections(by_profile))
    experiments: dict[str, list[dict[str, Any]]] = {name: [] for name in by_profile}
    for name, experiment, sections in published:
        experiments[name].append({"id": f"{name}-{experiment.name}", **_experiment(experiment, sections, measured)})
    embedded: Iterable[Record | SpeedRecord] = itertools.chain(*by_profile.values(), measured)
    environment = Environment(loader=PackageLoader("bench.report", "web"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"method": _method, "packed": _packed}
    return environment.get_template("report.html").render(
        conclusions=conclusions(published, speeds, claims),
        contents=_contents(published, by_profile, measured),
        claims=_claims(claims),
        profiles=experiments,
        runs={name: _runs(found) for name, found in by_profile.items()},
        goals=_markdown(goal_table(speeds)),
        speeds=[_speed(record) for record in measured],
        records={handle(record.id): _embedded(record) for record in embedded},
        datatables=Path(itables.options.dt_bundle).read_text(encoding="utf-8"),
    )


def _contents(
    published: list[tuple[str, Experiment, list[Section]]], profiles: Iterable[str], measured: list[SpeedRecord]
) -> list[ContentsEntry]:
    """Return the table of contents.

    It lists the claims, the experiments of each profile, and the speed measurements.
    """
    of_profiles = [
        ContentsEntry(
            profile,
            profile,
            tuple(
                ContentsEntry(f"{name}-{experiment.name}", experiment.title.partition(":")[0])
                for name, experiment, _ in published
                if name == profile
            ),
        )
        for profile in profiles
    ]
    titles = Counter(map(_speed_title, measured))
    of_speed = tuple(
        ContentsEntry(_speed_id(r), _speed_title(r) + (f", {len(r.rows)} rows" if titles[_speed_title(r)] > 1 else ""))
        for r in measured
    )
    return [ContentsEntry("claims", "Claims"), *of_profiles, ContentsEntry("speed", "Speed", of_speed)]


def _experiment(experiment: Experiment, sections: list[Section], speeds: list[SpeedRecord]) -> dict[str, Any]:
    """Return an experiment's sections and figures.

    The figures follow the leaderboards. On the page of a figure they come before its long tables.
    """
    tables = [number for number, section in enumerate(sections) if not isinstance(section, str)]
    first = sections[tables[0]] if tables else None
    rows = first.rows if isinstance(first, Leaderboard | AdapterSection) else []
    rendered = [
        _leaderboard(section) if isinstance(section, Leaderboard) else _markdown(str(section)) for section in sections
    ]
    drawn = adapter_figures(experiment, rows) if experiment.figure else score_figures(experiment, rows, speeds)
    split = tables[0] if experiment.figure and tables else tables[-1] + 1 if tables else len(sections)
    return {
        "before": rendered[:split],
        "methods": dict.fromkeys(row.method for row in rows),
        "figures": [(title, Markup(svg)) for title, svg in drawn],
        "after": rendered[split:],
    }


def _speed(record: SpeedRecord) -> dict[str, Any]:
    """Return a speed measurement's table, and its figure if it is of whole models."""
    heading, _, text = section(record).partition("\n\n")
    body = _markdown(text)
    figure = None if record.mode == "layer" else step_figure("Seconds of a step", record, link([record.id]))
    return {
        "id": _speed_id(record),
        "heading": _markdown(heading),
        "text": body,
        "has_paper_rows": 'class="paper"' in body,
        "figure": figure and Markup(figure),
    }


def _speed_id(record: SpeedRecord) -> str:
    return f"speed-{handle(record.id)}"


def _speed_title(record: SpeedRecord) -> str:
    work = f"sweep of {record.options.sweep}" if record.mode == "layer" else record.mode
    return f"{record.shape}, {work}, {record.provenance.device}"


def _markdown(text: str) -> Markup:
    """Return Markdown as HTML.

    Its headings are two levels down and every table is in a scrolling container.
    """
    parser = MarkdownIt("js-default")  # it escapes HTML in its input
    tokens = parser.parse(text)
    for number, token in enumerate(tokens):
        if token.type.startswith("heading"):
            token.tag = f"h{int(token.tag[1]) + 2}"
        if token.type == "tr_open" and tokens[number + 2].content.endswith(_PAPER_ROW):
            token.attrSet("class", "paper")
    html = str(parser.renderer.render(tokens, parser.options, {}))
    return Markup(html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>"))


def _method(name: str, title: str = "") -> Markup:
    colour, marker = style(name)
    mark = Markup('<i style="color: {}" aria-hidden="true">{}</i> ').format(colour, GLYPHS[marker])
    return mark + (title or title_of(name))


def _embedded(record: Record | SpeedRecord) -> dict[str, Any]:
    """Return a record as JSON, without the outcomes of its items."""
    return {"id": record.id} | record.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude={"items", "path"}
    )


def _packed(value: Any) -> str:
    """Return a value as base64 of gzipped JSON.

    Records and code are large, and compress well.
    """
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), mtime=0)).decode()


def _cells(texts: Iterable[Any], to: str = "", order: dict[int, Any] | None = None) -> list[Markup]:
    """Return cells that link to records.

    Args:
        texts: Contents of the cells.
        to: Address that the cells link to.
        order: Values that cells are sorted by, where that is not their text.
    """
    cells = []
    for number, text in enumerate(texts):
        # The tab key stops at the first link of a row only.
        tag, rest = ("td", ' tabindex="-1"') if number else ("th", "")
        content = Markup('<a href="{}"{}>{}</a>').format(to, Markup(rest), text) if to and text != "" else text
        by = (order or {}).get(number)
        attribute = "" if by is None else Markup(' data-order="{}"').format(by)
        cells.append(Markup("<{0}{1}>{2}</{0}>").format(tag, attribute, content))
    return cells


def _leaderboard(leaderboard: Leaderboard) -> Table:
    """Return a leaderboard with a bar for each mean's interval."""
    scored = [row.mean for row in leaderboard.rows if row.records]
    low = min((mean.value - mean.half_width for mean in scored), default=0.0)
    high = max((mean.value + mean.half_width for mean in scored), default=1.0)
    at = leaderboard.head.index("mean") + 1
    lines = []
    for row, cells_text in leaderboard.lines:
        texts = [text.replace("*", "") if isinstance(text, str) else text for text in cells_text]
        bar: str = ""
        mean = texts[at - 1].partition(" ")[0]
        if row and row.records:
            ends = [row.mean.value + sign * row.mean.half_width for sign in (-1, 0, 1)]
            bar = _RANGE.format(style(row.method)[0], *(100 * (end - low) / (high - low or 1) for end in ends))
        name = _method(row.method, row.title) if row else texts[0]
        cells = _cells([name, *texts[1:at], bar, *texts[at:]], link(r.id for r in row.sources) if row else "",
                       {0: texts[0], 2: texts[2].replace(",", ""), at - 1: mean, at: mean})  # fmt: skip
        lines.append(("" if row else "paper", cells))
    head = [*leaderboard.head[:at], f"{low:.0f} to {high:.0f}", *leaderboard.head[at:]]
    return Table(head, lines, _markdown(leaderboard.notes))


def _claims(claims: list[Claim]) -> Table:
    rows = []
    for c in claims:
        claim = Markup("{} <small>{}</small>").format(c.claim, c.source)
        verdict = _VERDICT.format(verdict_word(c.verdict), c.verdict)
        rows.append(("", _cells([claim, c.paper, c.ours, verdict], link(c.records) if c.records else "")))
    return Table(["claim", "the paper", "ours", "verdict"], rows, _markdown(NOTES))


def _runs(records: list[Record]) -> Table:
    rows = []
    for r in records:
        options = ", ".join(f"{name}={value}" for name, value in r.config.method_options.items())
        means = ["" if mean is None else f"{mean:.1f}" for mean in (r.mean("validation"), r.mean())]
        rate = "" if r.config.learning_rate is None else f"{r.config.learning_rate:g}"
        texts = [rate, r.config.seed, r.config.mixture, options, r.status, *means, r.provenance.device]
        rows.append(("", _cells([_method(r.config.method), *texts], link([r.id]))))
    head = ["method", "learning rate", "seed", "mixture", "options", "status", "validation", "test", "device"]
    return Table(head, rows)
