"""Records of speed to Markdown and a figure. Pure: the same records give the same bytes."""

from __future__ import annotations

import statistics
from xml.sax.saxutils import escape

from tabulate import tabulate

from bench.records.schema import SpeedRecord
from bench.report.paper import paper
from bench.report.speed.goals import goal_table
from bench.report.speed.summary import (
    age,
    by_work,
    compared,
    fastest,
    malora_row,
    named,
    number,
    ratio,
    seconds,
    shown,
    summary,
    tokens_per_second,
)


def pages(records: list[SpeedRecord]) -> dict[str, str]:
    """The generated files of a folder of records, by name: table10.md, and figure4c.svg where training was measured."""
    if not records:
        return {}
    parts = ["# Speed (the paper's Table 10 and Figure 4c)", goal_table(records)]
    for group in by_work(records):
        whole = shown(group)
        parts += map(section, whole)
        if rest := [r for r in group if r not in whole]:
            parts.append(_others(rest))
    made = {"table10.md": "\n\n".join(parts) + "\n"}
    trained = [r for r in shown(records) if r.mode == "train" and fastest(r, lambda row: True)]
    if trained:
        biggest = max(trained, key=lambda r: (r.options.flops, compared(r)))
        made["figure4c.svg"] = figure4c(biggest)
    return made


def _others(records: list[SpeedRecord]) -> str:
    """A line for each record of the same work that is not shown whole, by age."""
    body = []
    for r in sorted(records, key=age):
        step = seconds(malora_row(r))
        ratios = [number(ratio(step, seconds(named(r, name)))) for name in ("floor-compiled", "peft-lora")]
        commit = (r.provenance.commit or "unknown")[:12]
        body.append([f"`{r.id}`", f"`{commit}`", r.options.rounds, len(r.rows), number(step), *ratios])
    head = ["record", "commit", "rounds", "rows", "MALoRA's step, s", "× compiled floor", "× PEFT LoRA"]
    align = ("left", "left", *["right"] * 5)
    table = tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=align)
    return f"Other records of the same work, of earlier code or of the same rows:\n\n{table}"


def section(record: SpeedRecord) -> str:
    """What one call measured, with how to read it."""
    options = record.options
    what = f"{record.shape}, " + (f"one linear map, {options.sweep}" if record.mode == "layer" else record.mode)
    table = _sweep_table(record) if record.mode == "layer" else _table(record)
    title = f"## {what}, {record.provenance.device}"
    return "\n\n".join(filter(None, [title, _intro(record), table, _notes(record), _where(record)]))


def _intro(record: SpeedRecord) -> str:
    o, p = record.options, record.provenance
    work = {
        "train": f"{o.tokens:,} tokens a step in micro-batches of {o.batch} × {o.length}",
        "prefill": f"{o.batch} × {o.length} tokens a pass",
        "decode": f"{o.tokens} tokens after a prompt of {o.length}, {o.batch} at a time",
        "layer": ("" if o.sweep == "tokens" else f"{o.tokens:,} tokens, ") + "forward and backward",
    }[record.mode]
    rates = [[getattr(record.peak_rates[when], what) for when in ("before", "after")] for what in _CEILINGS]
    versions = ", ".join(f"{name} {p.packages[name]}" for name in ("torch", "transformers", "peft"))
    lines = [
        f"{work[0].upper()}{work[1:]}, on {p.device}; {versions}; commit `{(p.commit or 'unknown')[:12]}`. "
        f"Random weights, dropout {o.dropout:g}, {o.rounds} rounds. The device's ceilings before and after: "
        f"matrix product {rates[0][0] / 1e12:.3g} and {rates[0][1] / 1e12:.3g} TFLOP/s, "
        f"copy {rates[1][0] / 1e12:.3g} and {rates[1][1] / 1e12:.3g} TB/s."
    ]
    if p.cuda is None:
        lines.append("**These are a CPU's figures**: they show that the command works, and say nothing about a GPU.")
    if not record.complete:
        lines.append(f"**The backbone was cut to {o.layers} layers** (`--layers`): this measures nothing.")
    return "\n\n".join(lines)


# Backends whose work grows with k·r; that of the others grows with N·r.
_SPARSE = ("dispatch", "sorted")
_CEILINGS = ("matrix_flops_per_second", "copy_bytes_per_second")
_PARTS = ("forward", "backward", "optimizer")
_FLOORS = {"floor-compiled": "compiled floor", "floor-captured": "captured floor", "floor": "floor"}


def _table(record: SpeedRecord) -> str:
    train = record.mode == "train"
    floors = {title: seconds(named(record, name)) for name, title in _FLOORS.items()}
    floors = {title: floor for title, floor in floors.items() if floor}
    lora = seconds(named(record, "peft-lora"))
    rate = max(record.peak_rates[when].matrix_flops_per_second for when in ("before", "after"))
    head = ["variant", *(_PARTS if train else ()), "step, s", "spread", "tokens/s", *(f"× {title}" for title in floors),
            "× PEFT LoRA", "share of rate", "allocated, GiB", "reserved, GiB", "MHz", "W", "kernels", "launches",
            "waits", "trainable", "note"]  # fmt: skip
    body = []
    for row in record.rows:
        step = seconds(row)
        if step is None:
            body.append([row.name, *[""] * (len(head) - 2), f"{row.status}: {row.reason}"])
            continue
        peak, sensors = row.peak_bytes, row.sensors
        share = record.options.flops and record.options.flops / step / rate
        body.append([
            row.name, *([number(seconds(row, part)) for part in _PARTS] if train else []),
            number(step), number(summary(row.seconds["step"])[1], 2), f"{tokens_per_second(record, row):,.0f}",
            *(number(ratio(step, other), 3) for other in (*floors.values(), lora)),
            "" if share is None else f"{share:.1%}",
            *(f"{getattr(peak, kind) / 2**30:.1f}" if peak else "" for kind in ("allocated", "reserved")),
            *(f"{statistics.median(sensors[what]):.0f}" if what in sensors else "" for what in ("clock_mhz", "watts")),
            *("" if (number_of := getattr(row, what)) is None else f"{number_of:,}" for what in ("kernels", "launches", "synchronisations")),
            f"{row.trainable:,}", row.reason or "",
        ])  # fmt: skip
    if train:
        body += _paper_rows(len(head), len(floors))
    align = ("left", *["right"] * (len(head) - 2), "left")
    return tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=align)


def _paper_rows(columns: int, floors: int) -> list[list[str]]:
    theirs = paper()["table10"]
    rows = []
    for name, row in theirs.items():
        cells = [f"*{row[part + '_s']}*" for part in (*_PARTS, "step")]
        cells += ["", f"*{1e6 / row['us_per_token']:,.0f}*", *[""] * floors]
        cells.append(f"*{row['step_s'] / theirs['LoRA']['step_s']:.3g}*")
        rows.append([f"*{name}, the paper's*", *cells, *[""] * (columns - len(cells) - 1)])
    return rows


def _sweep_table(record: SpeedRecord) -> str:
    """Milliseconds by value and backend; the fastest of a value is bold."""
    names = list(dict.fromkeys(row.name for row in record.rows))
    body = []
    for value in dict.fromkeys(row.value for row in record.rows):
        rows = {row.name: row for row in record.rows if row.value == value}
        best = min((s for s in map(seconds, rows.values()) if s is not None), default=None)
        cells = []
        for name in names:
            step = seconds(rows.get(name))
            cell = rows[name].status if step is None else f"{1e3 * step:.3g}"
            cells.append(f"**{cell}**" if step is not None and step == best else cell)
        body.append([value, *cells])
    head = [record.options.sweep, *names]
    return tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=["right"] * len(head))


def _crossovers(record: SpeedRecord) -> list[str]:
    """Of each method, the values at which a sparse row is the fastest that ran."""
    lines = []
    for method in dict.fromkeys(row.method for row in record.rows):
        won: dict[str, list[int]] = {}
        for value in dict.fromkeys(row.value for row in record.rows):
            best = fastest(record, lambda row, at=(method, value): (row.method, row.value) == at)
            if best and best.backend in _SPARSE:
                won.setdefault(best.name, []).append(value)
        where = (f"`{name}` is the fastest at {', '.join(map(str, values))}" for name, values in won.items())
        lines.append(f"Crossover, {method} by {record.options.sweep}: {'; '.join(where) or 'no sparse row wins'}.")
    return lines


def _notes(record: SpeedRecord) -> str:
    if record.mode == "layer":
        text = "Milliseconds of a forward and backward pass, medians; captured rows are CUDA graphs, and not compiled."
        return "\n\n".join([text, *_crossovers(record)])
    text = (
        "Medians over all rounds; the spread is the interquartile range of a step. Rows were measured in turns. The "
        "share of the rate counts the frozen backbone's matrix operations alone, against the higher ceiling. Peak "
        "memory holds the frozen weights and the row's own. MHz and W are the device's clock and power, medians while "
        "steps ran. Waits are the host's for the device, in one step. "
    )
    if record.mode == "train":
        text += (
            "A captured step has forward and backward in one. The rows in *italics* are the paper's "
            f"({paper()['source']}): {paper()['table10_source']}."
        )
    return text.rstrip()


def _where(record: SpeedRecord) -> str:
    """The kernels that took longest in a step of MALoRA's fastest row, beside the compiled floor's."""
    parts = []
    for row in (malora_row(record), named(record, "floor-compiled")):
        if row is None or not row.where or record.mode == "layer":
            continue
        busy = sum(taken for _, _, taken in row.where)
        body = [[f"`{name[:60]}`", f"{calls:,}", f"{1e3 * taken:.1f}"] for name, calls, taken in row.where]
        table = tabulate(body, ["kernel", "calls", "ms"], tablefmt="pipe", disable_numparse=True,
                         colalign=("left", "right", "right"))  # fmt: skip
        parts.append(f"Where a step of `{row.name}` spends its time; these kernels take {busy:.3g} s:\n\n{table}")
    return "\n\n".join(parts)


def figure4c(record: SpeedRecord) -> str:
    """Seconds of a training step by variant, as bars, and below them the paper's on their own scale.

    SVG written by hand, so that its bytes are the record's alone.
    """
    ours = sorted(((seconds(row), row.name) for row in record.rows if seconds(row) is not None), reverse=True)
    theirs = sorted(((row["step_s"], name) for name, row in paper()["table10"].items()), reverse=True)
    bars, height = [], 0
    for title, rows in (
        (f"Seconds of a training step, {record.shape}, {record.provenance.device}", ours),
        (f"The paper's: {paper()['table10_source']}", theirs),
    ):
        bars += _bars(title, rows, height)
        height += 40 + _ROW * len(rows)
    size = f'width="{_LEFT + _WIDTH}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', background, *bars, "</svg>"]) + "\n"


_LEFT, _WIDTH, _ROW = 220, 560, 20  # pixels: names, bars, and the height of one


def _bars(title: str, rows: list[tuple[float, str]], top: int) -> list[str]:
    """The first is the longest, and as wide as there is room for."""
    scale = (_WIDTH - 70) / rows[0][0]
    bars = [f'<text x="8" y="{top + 18}" font-weight="bold">{escape(title)}</text>']
    for place, (step, name) in enumerate(rows):
        y = top + 30 + place * _ROW
        fill = "#c44e52" if name.lower().startswith("malora") else "#8c8c8c" if name.startswith("floor") else "#4c72b0"
        bars += [
            f'<text x="{_LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y + 2}" width="{step * scale:.1f}" height="{_ROW - 5}" fill="{fill}"/>',
            f'<text x="{_LEFT + step * scale + 5:.1f}" y="{y + 13}">{step:.3g}</text>',
        ]
    return bars
