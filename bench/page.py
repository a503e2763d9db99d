"""Records to one HTML page that a person looks at, opened from the file system, without a network. Pure.

It has the tables of `bench.report`, which DataTables sorts and filters (itables brings it along), and figures as SVG.
The records that a figure is made of are in the page too, and open where the figure stands.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import itables.options
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from bench import figures
from bench.experiments import Experiment
from bench.figures import Line, link
from bench.profiles import PROFILES
from bench.record import Record, SpeedRecord
from bench.report import Board, published_parts
from bench.rows import TITLES, Row, comparable
from bench.run import BASE
from bench.speed_report import goal_table, latest, seconds, section
from tasks import TASKS

_RANGE = Markup('<span class="range" style="color: {}; --from: {:.1f}%; --at: {:.1f}%; --to: {:.1f}%"></span>')
_VERDICT = Markup('<span data-verdict="{}">{}</span>')


class Table(NamedTuple):
    """For the template: rows of cells, each row with its class."""

    head: list[str]
    rows: list[tuple[str, list[Markup]]]
    notes: str = ""


def page(records: dict[str, list[Record]], speeds: list[SpeedRecord], claims: list[Any]) -> str:
    """The page of these records by profile; `claims` are `bench.claims.Claim`s."""
    measured = latest(speeds)
    records = {name: sorted(found, key=lambda r: r.id) for name, found in records.items()}
    of_profiles = {name: [] for name in reversed(PROFILES) if records.get(name)}
    for (name, experiment), parts in published_parts({name: records[name] for name in of_profiles}).items():
        boards = [number for number, part in enumerate(parts) if isinstance(part, Board)]
        rows = parts[boards[0]].rows if boards else []
        shown = [_leaderboard(part) if isinstance(part, Board) else _markdown(part) for part in parts]
        drawn = _figures(experiment, rows, comparable(records[name], experiment)[0], measured)
        after = boards[-1] + 1 if boards else len(parts)
        of_profiles[name].append((shown[:after], [row.method for row in rows], drawn, shown[after:]))
    environment = Environment(loader=PackageLoader("bench", "web"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {}  # in the records' own order
    environment.filters["method"] = _method
    return environment.get_template("report.html").render(
        claims=_claims(claims),
        profiles=of_profiles,
        runs={name: _runs(records[name]) for name in of_profiles},
        goals=_markdown(goal_table(speeds)),
        speeds=[(_markdown(section(r)), _made((figures.steps, "Seconds of a step", r))) for r in measured],
        records={r.id: _embedded(r) for r in itertools.chain(*records.values(), measured)},
        datatables=Path(itables.options.dt_bundle).read_text(),
    )


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
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in ("items", "path")}
    return fields | ({"config": dataclasses.asdict(record.config)} if isinstance(record, Record) else {})


def _cells(texts: Iterable[Any], to: str = "", order: dict[int, Any] | None = None) -> list[Markup]:
    """Cells that lead to records; `order` is what some of them are sorted by. Tab stops at the first of a row only."""
    cells = []
    for number, text in enumerate(texts):
        tag, rest = ("td", ' tabindex="-1"') if number else ("th", "")
        inside = Markup('<a href="{}"{}>{}</a>').format(to, Markup(rest), text) if to else text
        by = (order or {}).get(number)
        by = "" if by is None else Markup(' data-order="{}"').format(by)
        cells.append(Markup("<{0}{1}>{2}</{0}>").format(tag, by, inside))
    return cells


def _leaderboard(board: Board) -> Table:
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
        cells = _cells([name, *texts[1:at], bar, *texts[at:]], link([*row.records, *row.broken]) if row else "",
                       {0: texts[0], 2: texts[2].replace(",", ""), at - 1: mean, at: mean})  # fmt: skip
        lines.append(("" if row else "paper", cells))
    head = [*board.head[:at], f"{low:.0f} to {high:.0f}", *board.head[at:]]
    return Table(head, lines, _markdown(board.notes))


def _claims(claims: list[Any]) -> Table:
    rows = []
    for c in claims:
        claim = Markup("{} <small>{}</small>").format(c.claim, c.source)
        verdict = _VERDICT.format(c.verdict.partition(",")[0], c.verdict)
        rows.append(("", _cells([claim, c.paper, c.ours, verdict], "#" + ",".join(c.records) if c.records else "")))
    return Table(["claim", "the paper", "ours", "verdict"], rows)


def _runs(records: list[Record]) -> Table:
    rows = []
    for r in records:
        options = ", ".join(f"{name}={value}" for name, value in r.config.method_options.items())
        means = ["" if mean is None else f"{mean:.1f}" for mean in (r.mean("validation"), r.mean())]
        rate = "" if r.config.learning_rate is None else f"{r.config.learning_rate:g}"
        texts = [rate, r.config.seed, r.config.mixture, options, r.status, *means, r.provenance["device"]]
        rows.append(("", _cells([_method(r.config.method), *texts], link([r]))))
    head = ["method", "rate", "seed", "mixture", "options", "status", "validation", "test", "device"]
    return Table(head, rows)


def _made(*wanted: tuple) -> list[tuple[str, Markup]]:
    """Titles and figures, of those that there are records for."""
    made = [(title, draw(title, *arguments)) for draw, title, *arguments in wanted]
    return [(title, Markup(svg)) for title, svg in made if svg]


def _figures(
    experiment: Experiment, rows: list[Row], records: list[Record], speeds: list[SpeedRecord]
) -> list[tuple[str, Markup]]:
    if getattr(experiment, "figure", None):
        return _made(*_inside([r for r in records if r.inside]))
    runs = [r for row in rows for r in (*row.records, *row.broken) if r.train]

    def over_steps(part: str, key: str) -> list[Line]:
        readings = [(r, [p for p in r.train[part] if p[key] is not None]) for r in runs]
        return [Line(r.config.method, [p["step"] for p in ps], [p[key] for p in ps], r) for r, ps in readings if ps]

    entropy, share = over_steps("router", "entropy"), over_steps("router", "largest_share")
    return _made(
        (figures.means, "Accuracy against trainable parameters", "trainable parameters", rows, _trainable),
        (figures.means, "Accuracy against the time of a training step", *step_seconds(rows, speeds), "s"),
        (figures.lines, "Training loss", "step", {"loss": over_steps("curve", "loss")}, "log"),
        (figures.lines, "Routers in training: entropy, and the busiest expert's share", "step",
         {"entropy, nats": entropy, "largest share": share}),
    )  # fmt: skip


def _inside(records: list[Record]) -> list[tuple]:
    """What is inside trained adapters: Figures 2 and 3, and what the paper does not show."""

    def over(values: Callable[[dict], list[float]]) -> list[Line]:
        return [Line(r.config.method, range(len(values(r.inside))), values(r.inside), r) for r in records]

    heats = []
    for method in dict.fromkeys(r.config.method for r in records):
        routing = [r.inside["routing"] for r in records if r.config.method == method]
        shares = {TASKS[t].title: np.mean([r["largest_share"][t] for r in routing], 0) for t in routing[0]["entropy"]}
        name = TITLES.get(method, method)
        heats += [(figures.heat, f"{name}: the busiest expert's share, by layer and task", "task", shares),
                  (figures.heat, f"{name}: load of the experts, the busiest first, by layer", "expert",
                   dict(enumerate(np.mean([r["load"] for r in routing], 0).T, 1)))]  # fmt: skip
    return [
        (figures.alike, "How alike experts are (Figure 2)", records),
        (figures.lines, "Singular values of the stacked experts (Figure 3)", "number",
         {f"of {side}": over(lambda inside, side=side: inside["spectra"][side]["values"]) for side in "AB"}),
        (figures.lines, "By layer: how far the down side moved, and what an expert says of the task", "layer",
         {"relative movement": over(lambda inside: inside["movement"]["relative"]),
          "information, nats": over(lambda inside: inside["routing"]["task_information"])}),
        *heats,
    ]  # fmt: skip


def _trainable(row: Row) -> int | None:
    return row.records[0].parameters and row.records[0].parameters["trainable"]


def step_seconds(found: list[Row], speeds: list[SpeedRecord]) -> tuple[str, list[Row], Callable[[Row], float | None]]:
    """Seconds of a training step, of the fastest way to compute an adapter, known by its method and size.

    They are of the one measurement that has most of the rows. The runs' own seconds are no speed: runs share a machine.
    """

    def step(row: Row, record: SpeedRecord) -> float | None:
        adapter = row.method, _trainable(row)
        same = [s for s in record.rows if ((s["method"] or BASE).removeprefix("peft-"), s["trainable"]) == adapter]
        return min(filter(None, map(seconds, same)), default=None)

    scored = [row for row in found if row.records]
    trained = [record for record in speeds if record.mode == "train"]
    best = max(trained, key=lambda record: sum(step(row, record) is not None for row in scored), default=None)
    return f"a step on {best.provenance['device'] if best else ''}", scored if best else [], lambda row: step(row, best)
