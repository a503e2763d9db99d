"""Records to one HTML page that a person looks at, opened from the file system, without a network. Pure.

It has the tables of `bench.report`, which DataTables sorts and filters (itables brings it along), and figures as SVG.
The records that a figure is made of are in the page too, and open where the figure stands.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import itables.options
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

import malora
from bench.experiments.methods import BASE, TITLES
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import Experiment
from bench.records.schema import Record, SpeedRecord
from bench.report import figures
from bench.report.claims import NOTES, Claim
from bench.report.figures import Line, handle, link
from bench.report.readme import published_parts
from bench.report.scores.adapter_tables import reading, readings
from bench.report.scores.document import Leaderboard, Section
from bench.report.scores.selection import TableRow
from bench.report.speed.goals import goal_table
from bench.report.speed.summary import exact_rows, seconds, shown
from bench.report.speed.tables import section
from tasks import TASKS

_RANGE = Markup('<span class="range" style="color: {}; --from: {:.1f}%; --at: {:.1f}%; --to: {:.1f}%"></span>')
_VERDICT = Markup('<span data-verdict="{}">{}</span>')


class Table(NamedTuple):
    """For the template: rows of cells, each row with its class."""

    head: list[str]
    rows: list[tuple[str, list[Markup]]]
    notes: str = ""


def page(records: dict[str, list[Record]], speeds: list[SpeedRecord], claims: list[Claim]) -> str:
    """The page of these records, by profile."""
    measured = shown(speeds)
    records = {name: sorted(found, key=lambda r: r.id) for name, found in records.items()}
    of_profiles = {name: [] for name in reversed(PROFILES) if records.get(name)}
    for name, experiment, parts in published_parts({name: records[name] for name in of_profiles}):
        of_profiles[name].append(_experiment(experiment, parts, measured))
    environment = Environment(loader=PackageLoader("bench.report", "web"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"method": _method, "packed": _packed}
    return environment.get_template("report.html").render(
        claims=_claims(claims),
        profiles=of_profiles,
        runs={name: _runs(records[name]) for name in of_profiles},
        goals=_markdown(goal_table(speeds)),
        speeds=[(_markdown(section(r)), _made((figures.steps, "Seconds of a step", r))) for r in measured],
        records={handle(r.id): _embedded(r) for r in itertools.chain(*records.values(), measured)},
        datatables=Path(itables.options.dt_bundle).read_text(),
    )


def _experiment(experiment: Experiment, parts: list[Section], speeds: list[SpeedRecord]) -> dict[str, Any]:
    """Its parts, with the figures after the leaderboards, or before the long tables of a figure's page."""
    tables = [number for number, part in enumerate(parts) if not isinstance(part, str)]
    rows = parts[tables[0]].rows if tables else []
    shown = [_leaderboard(part) if isinstance(part, Leaderboard) else _markdown(str(part)) for part in parts]
    split = tables[0] if experiment.figure and tables else tables[-1] + 1 if tables else len(parts)
    return {
        "before": shown[:split],
        "methods": dict.fromkeys(row.method for row in rows),
        "figures": (_inside if experiment.figure else _scores)(experiment, rows, speeds),
        "after": shown[split:],
    }


def _markdown(text: str) -> Markup:
    parser = MarkdownIt("js-default")  # it escapes the HTML that it is given
    tokens = parser.parse(text)
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = f"h{int(token.tag[1]) + 2}"  # below the page's own
    return Markup(parser.renderer.render(tokens, parser.options, {}))


def _method(name: str, title: str = "") -> Markup:
    colour, marker = figures.style(name)
    mark = Markup('<i style="color: {}" aria-hidden="true">{}</i> ').format(colour, figures.GLYPHS[marker])
    return mark + (title or TITLES.get(name, name))


def _embedded(record: Record | SpeedRecord) -> dict[str, Any]:
    """A record as JSON, without the outcomes of its items."""
    return {"id": record.id} | record.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude={"items", "path"}
    )


def _packed(value: Any) -> str:
    """JSON, gzipped, in base64: records and code repeat themselves, and both are large."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), mtime=0)).decode()


def _cells(texts: Iterable[Any], to: str = "", order: dict[int, Any] | None = None) -> list[Markup]:
    """Cells that lead to records; `order` is what some of them are sorted by. Tab stops at the first of a row only."""
    cells = []
    for number, text in enumerate(texts):
        tag, rest = ("td", ' tabindex="-1"') if number else ("th", "")
        inside = Markup('<a href="{}"{}>{}</a>').format(to, Markup(rest), text) if to and text != "" else text
        by = (order or {}).get(number)
        by = "" if by is None else Markup(' data-order="{}"').format(by)
        cells.append(Markup("<{0}{1}>{2}</{0}>").format(tag, by, inside))
    return cells


def _leaderboard(board: Leaderboard) -> Table:
    scored = [row.mean for row in board.rows if row.records]
    low = min((mean.value - mean.half_width for mean in scored), default=0.0)
    high = max((mean.value + mean.half_width for mean in scored), default=1.0)
    at = board.head.index("mean") + 1
    lines = []
    for row, texts in board.lines:
        texts, bar = [text.replace("*", "") if isinstance(text, str) else text for text in texts], ""
        mean = texts[at - 1].partition(" ")[0]
        if row and row.records:
            ends = [row.mean.value + sign * row.mean.half_width for sign in (-1, 0, 1)]
            bar = _RANGE.format(figures.style(row.method)[0], *(100 * (end - low) / (high - low or 1) for end in ends))
        name = _method(row.method, row.title) if row else texts[0]
        cells = _cells([name, *texts[1:at], bar, *texts[at:]], link(r.id for r in row.sources) if row else "",
                       {0: texts[0], 2: texts[2].replace(",", ""), at - 1: mean, at: mean})  # fmt: skip
        lines.append(("" if row else "paper", cells))
    head = [*board.head[:at], f"{low:.0f} to {high:.0f}", *board.head[at:]]
    return Table(head, lines, _markdown(board.notes))


def _claims(claims: list[Claim]) -> Table:
    rows = []
    for c in claims:
        claim = Markup("{} <small>{}</small>").format(c.claim, c.source)
        verdict = _VERDICT.format(c.verdict.partition(",")[0], c.verdict)
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
    head = ["method", "rate", "seed", "mixture", "options", "status", "validation", "test", "device"]
    return Table(head, rows)


def _made(*wanted: tuple) -> list[tuple[str, Markup]]:
    """Titles and figures, of those that there are records for."""
    made = [(title, draw(title, *arguments)) for draw, title, *arguments in wanted]
    return [(title, Markup(svg)) for title, svg in made if svg]


def _scores(experiment: Experiment, rows: list[TableRow], speeds: list[SpeedRecord]) -> list[tuple[str, Markup]]:
    runs = [r for row in rows for r in row.sources if r.train]

    def over_steps(part: str, key: str) -> list[Line]:
        readings = [(r, [p for p in getattr(r.train, part) if getattr(p, key) is not None]) for r in runs]
        return [
            Line(r.config.method, [p.step for p in ps], [getattr(p, key) for p in ps], r) for r, ps in readings if ps
        ]

    entropy, share = over_steps("router", "entropy"), over_steps("router", "largest_share")
    return _made(
        (figures.means, "Mean score against β, for each d (Figure 4b)", "β", rows, _beta, None, _d)
        if experiment.name == "table12"
        else (figures.means, "Mean score against trainable parameters", "trainable parameters", rows, _trainable),
        (figures.means, "Mean score against the time of a training step", *step_seconds(rows, speeds), "s"),
        (figures.lines, "Training loss", "step", {"loss": over_steps("curve", "loss")}, "log"),
        (figures.lines, "Routers in training: entropy, and the busiest expert's share", "step",
         {"entropy, nats": entropy, "largest share": share}),
    )  # fmt: skip


def _inside(experiment: Experiment, rows: list[TableRow], speeds: list[SpeedRecord]) -> list[tuple[str, Markup]]:
    """What is inside trained adapters: Figures 2 and 3, and what the paper does not show."""
    if experiment.figure == "similarity":
        return _made((figures.alike, "How alike experts are (Figure 2)", readings(rows, "mean")))
    runs = {row.title: [r for r in row.sources if r.inside] for row in rows if not row.entry.single_task}

    def over(*path: str) -> list[Line]:
        found = [(r, reading(r.inside, *path)) for of in runs.values() for r in of]
        return [Line(r.config.method, range(len(values)), values, r) for r, values in found]

    heats = []
    for title, routing in ((title, [r.inside.routing for r in of]) for title, of in runs.items() if of):
        shares = {t: np.mean([r.largest_share[t] for r in routing], 0) for t in routing[0].largest_share}
        load = np.mean([r.load for r in routing], 0).T
        heats += [(figures.heat, f"{title}: the busiest expert's share, by layer and task", "task",
                   {TASKS[t].title: share for t, share in shares.items()}),
                  (figures.heat, f"{title}: load of the experts, the busiest first, by layer", "expert",
                   dict(enumerate(load, 1)))]  # fmt: skip
    return _made(
        (figures.lines, "Singular values of the stacked experts (Figure 3)", "number",
         {f"of {side}": over("spectra", side, "values") for side in "AB"}),
        (figures.lines, "How far the down side moved, and what an expert says of the task, by layer", "layer",
         {"relative movement": over("movement", "relative"),
          "information, nats": over("routing", "task_information")}),
        *heats,
    )  # fmt: skip


def _beta(row: TableRow) -> float | None:
    return None if row.method == BASE else malora.METHODS[row.method](**row.entry.options).beta


def _d(row: TableRow) -> str:
    return f"d={malora.METHODS[row.method](**row.entry.options).d}"


def _trainable(row: TableRow) -> int | None:
    return row.records[0].parameters and row.records[0].parameters.trainable


def step_seconds(
    found: list[TableRow], speeds: list[SpeedRecord]
) -> tuple[str, list[TableRow], Callable[[TableRow], float | None]]:
    """Seconds of a training step, of the fastest way to compute an adapter, known by its method and size.

    They are of the one measurement that has most of the rows. The runs' own seconds are no speed: runs share a machine.
    """

    def step(row: TableRow, record: SpeedRecord) -> float | None:
        adapter = row.method, _trainable(row)
        rows = exact_rows(record)
        same = [s for s in rows if ((s.method or BASE).removeprefix("peft-"), s.trainable) == adapter]
        return min(filter(None, map(seconds, same)), default=None)

    scored = [row for row in found if row.records]
    trained = [record for record in speeds if record.mode == "train"]
    best = max(trained, key=lambda record: sum(step(row, record) is not None for row in scored), default=None)
    return f"a step on {best.provenance.device if best else ''}", scored if best else [], lambda row: step(row, best)
