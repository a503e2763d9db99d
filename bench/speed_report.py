"""Records of speed to Markdown and a figure. Pure: the same records give the same bytes."""

from __future__ import annotations

import operator
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from tabulate import tabulate

from bench.paper import paper
from bench.record import SpeedRecord
from malora.backends import INEXACT

Row = dict[str, Any]


def summary(samples: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(samples) == 1:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low


def seconds(row: Row | None, part: str = "step") -> float | None:
    """Median of a row's samples; None if it was not measured."""
    samples = row["seconds"].get(part) if row and row["status"] == "ok" else None
    return summary(samples)[0] if samples else None


def tokens_per_second(record: SpeedRecord, row: Row | None) -> float | None:
    sequences = record.options["batch"] if record.mode == "decode" else 1
    return _ratio(sequences * record.options["tokens"], seconds(row))


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _named(record: SpeedRecord, name: str) -> Row | None:
    return next((row for row in record.rows if row["name"] == name), None)


def exact_rows(record: SpeedRecord) -> list[Row]:
    """Those that compute what their method says, within rounding."""
    return [row for row in record.rows if row["backend"] not in INEXACT]


def _fastest(record: SpeedRecord, choose: Callable[[Row], bool]) -> Row | None:
    """Of the exact rows that ran."""
    ran = [r for r in exact_rows(record) if seconds(r) is not None and choose(r)]
    return min(ran, key=seconds, default=None)


def latest(records: list[SpeedRecord]) -> list[SpeedRecord]:
    """Of the calls that asked for the same on the same device, the last one each; in a fixed order."""
    kept: dict[tuple, SpeedRecord] = {}
    for record in sorted(records, key=lambda r: (r.provenance["time"], r.id)):
        asked = (str(record.options[k]) for k in ("variant", "sweep", "batch", "length", "tokens", "layers"))
        kept[record.shape, record.mode, *asked, record.provenance["device"]] = record
    return [kept[key] for key in sorted(kept)]


def pages(records: list[SpeedRecord]) -> dict[str, str]:
    """The generated files of a folder of records, by name: table10.md, and figure4c.svg where training was measured."""
    if not records:
        return {}
    parts = ["# Speed (the paper's Table 10 and Figure 4c)", goal_table(records), *map(section, latest(records))]
    made = {"table10.md": "\n\n".join(parts) + "\n"}
    trained = [r for r in latest(records) if r.mode == "train" and _fastest(r, lambda row: True)]
    if trained:
        biggest = max(trained, key=lambda r: (r.options["flops"], _compared(r)))
        made["figure4c.svg"] = figure4c(biggest)
    return made


def section(record: SpeedRecord) -> str:
    """What one call measured, with how to read it."""
    options = record.options
    what = f"{record.shape}, " + (f"one linear map, {options['sweep']}" if record.mode == "layer" else record.mode)
    table = _sweep_table(record) if record.mode == "layer" else _table(record)
    return "\n\n".join(filter(None, [f"## {what}", _intro(record), table, _notes(record), _where(record)]))


def _intro(record: SpeedRecord) -> str:
    o, p = record.options, record.provenance
    work = {
        "train": f"{o['tokens']:,} tokens a step in micro-batches of {o['batch']} × {o['length']}",
        "prefill": f"{o['batch']} × {o['length']} tokens a pass",
        "decode": f"{o['tokens']} tokens after a prompt of {o['length']}, {o['batch']} at a time",
        "layer": f"{o['tokens']:,} tokens, forward and backward",
    }[record.mode]
    rates = [[record.ceilings[when][what] for when in ("before", "after")] for what in _CEILINGS]
    versions = ", ".join(f"{name} {p['packages'][name]}" for name in ("torch", "transformers", "peft"))
    lines = [
        f"{work[0].upper()}{work[1:]}, on {p['device']}; {versions}; commit `{(p['commit'] or 'unknown')[:12]}`. "
        f"Random weights, dropout {o['dropout']:g}, {o['rounds']} rounds. The device's ceilings before and after: "
        f"matrix product {rates[0][0] / 1e12:.3g} and {rates[0][1] / 1e12:.3g} TFLOP/s, "
        f"copy {rates[1][0] / 1e12:.3g} and {rates[1][1] / 1e12:.3g} TB/s."
    ]
    if p["cuda"] is None:
        lines.append("**These are a CPU's figures**: they show that the command works, and say nothing about a GPU.")
    if not record.complete:
        lines.append(f"**The backbone was cut to {o['layers']} layers** (`--layers`): this measures nothing.")
    return "\n\n".join(lines)


# Backends whose work grows with k·r; that of the others grows with N·r.
_SPARSE = ("dispatch", "sorted")
_CEILINGS = ("matrix_flops_per_second", "copy_bytes_per_second")
_PARTS = ("forward", "backward", "optimizer")


def _table(record: SpeedRecord) -> str:
    train = record.mode == "train"
    floors = [seconds(_named(record, name)) for name in ("floor-compiled", "floor")]
    lora = seconds(_named(record, "peft-lora"))
    rate = max(record.ceilings[when]["matrix_flops_per_second"] for when in ("before", "after"))
    head = ["variant", *(_PARTS if train else ()), "step, s", "spread", "tokens/s", "× compiled floor", "× floor",
            "× PEFT LoRA", "share of rate", "allocated, GiB", "reserved, GiB", "kernels", "launches", "waits",
            "trainable", "note"]  # fmt: skip
    body = []
    for row in record.rows:
        step = seconds(row)
        if step is None:
            body.append([row["name"], *[""] * (len(head) - 2), f"{row['status']}: {row['reason']}"])
            continue
        peak = row["peak_bytes"] or {}
        share = record.options["flops"] and record.options["flops"] / step / rate
        body.append([
            row["name"], *([_n(seconds(row, part)) for part in _PARTS] if train else []),
            _n(step), _n(summary(row["seconds"]["step"])[1], 2), f"{tokens_per_second(record, row):,.0f}",
            *(_n(_ratio(step, other), 3) for other in (*floors, lora)),
            "" if share is None else f"{share:.1%}",
            *(f"{peak[kind] / 2**30:.1f}" if peak else "" for kind in ("allocated", "reserved")),
            *("" if row[what] is None else f"{row[what]:,}" for what in ("kernels", "launches", "synchronisations")),
            f"{row['trainable']:,}", row["reason"] or "",
        ])  # fmt: skip
    if train:
        body += _paper_rows(len(head))
    align = ("left", *["right"] * (len(head) - 2), "left")
    return tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=align)


def _paper_rows(columns: int) -> list[list[str]]:
    theirs = paper()["table10"]
    rows = []
    for name, row in theirs.items():
        cells = [f"*{row[part + '_s']}*" for part in (*_PARTS, "step")]
        cells += [
            "",
            f"*{1e6 / row['us_per_token']:,.0f}*",
            "",
            "",
            f"*{row['step_s'] / theirs['LoRA']['step_s']:.3g}*",
        ]
        rows.append([f"*{name}, the paper's*", *cells, *[""] * (columns - len(cells) - 1)])
    return rows


def _sweep_table(record: SpeedRecord) -> str:
    """Milliseconds by value and backend; the fastest of a value is bold."""
    names = list(dict.fromkeys(row["name"] for row in record.rows))
    body = []
    for value in dict.fromkeys(row["value"] for row in record.rows):
        rows = {row["name"]: row for row in record.rows if row["value"] == value}
        best = min((s for s in map(seconds, rows.values()) if s is not None), default=None)
        cells = []
        for name in names:
            step = seconds(rows.get(name))
            cell = rows[name]["status"] if step is None else f"{1e3 * step:.3g}"
            cells.append(f"**{cell}**" if step is not None and step == best else cell)
        body.append([value, *cells])
    head = [record.options["sweep"], *names]
    return tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=["right"] * len(head))


def _crossovers(record: SpeedRecord) -> list[str]:
    """Of each method, the values at which a sparse row is the fastest that ran."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in record.rows):
        won: dict[str, list[int]] = {}
        for value in dict.fromkeys(row["value"] for row in record.rows):
            best = _fastest(record, lambda row, at=(method, value): (row["method"], row["value"]) == at)
            if best and best["backend"] in _SPARSE:
                won.setdefault(best["name"], []).append(value)
        where = (f"`{name}` is the fastest at {', '.join(map(str, values))}" for name, values in won.items())
        lines.append(f"Crossover, {method} by {record.options['sweep']}: {'; '.join(where) or 'no sparse row wins'}.")
    return lines


def _notes(record: SpeedRecord) -> str:
    if record.mode == "layer":
        text = "Milliseconds of a forward and backward pass, medians; captured rows are CUDA graphs, and not compiled."
        return "\n\n".join([text, *_crossovers(record)])
    text = (
        "Medians over all rounds; the spread is the interquartile range of a step. Rows were measured in turns. The "
        "share of the rate counts the frozen backbone's matrix operations alone, against the higher ceiling. Peak "
        "memory holds the frozen weights and the row's own. Waits are the host's for the device, in one step. "
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
    for row in (_mine(record), _named(record, "floor-compiled")):
        if row is None or not row.get("where") or record.mode == "layer":
            continue
        busy = sum(taken for _, _, taken in row["where"])
        body = [[f"`{name[:60]}`", f"{calls:,}", f"{1e3 * taken:.1f}"] for name, calls, taken in row["where"]]
        table = tabulate(body, ["kernel", "calls", "ms"], tablefmt="pipe", disable_numparse=True,
                         colalign=("left", "right", "right"))  # fmt: skip
        parts.append(f"Where a step of `{row['name']}` spends its time; these kernels take {busy:.3g} s:\n\n{table}")
    return "\n\n".join(parts)


def _n(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


# Rows of a large model's training that the goals compare MALoRA with.
COMPARED = ("lora-plain-compiled", "molora-loop", "molora-sorted-compiled", "malora-fp8-liger-captured")


@dataclass(frozen=True)
class Goal:
    """A figure that the project set itself. `measured` is None where no record has it."""

    figure: str
    relation: str  # of the measured figure to the goal
    goal: float
    measured: float | None

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return {"≤": operator.le, "≥": operator.ge, "=": operator.eq}[self.relation](self.measured, self.goal)


def goals(records: list[SpeedRecord]) -> list[Goal]:
    """The goals, from one record of each kind: the last of those that have most of what MALoRA is compared with.

    MALoRA is its fastest exact row, and all figures of one record are of that row.
    """
    large, small = _sources(records)
    mine = large and _mine(large)

    def times(other: Row | None) -> float | None:
        return _ratio(seconds(other), seconds(mine))

    def over(name: str, row: Row | None = mine) -> float | None:
        return large and _ratio(seconds(row), seconds(_named(large, name)))

    def fastest(prefix: str) -> Row | None:
        return large and _fastest(large, lambda row: row["name"].startswith(prefix))

    same = [mine and _named(large, mine["name"].replace("malora", m, 1)) for m in ("molora", "lora")]
    alike = [over("floor-compiled", row) for row in same]
    peaks = [(row["peak_bytes"] or {}).get("allocated") for row in (mine, large and _named(large, "peft-lora")) if row]
    decoded: list[float | None] = []
    for record in latest([r for r in records if r.mode == "decode" and _mine(r) and _named(r, "peft-lora")]):
        decoded.append(_ratio(seconds(_named(record, "peft-lora")), seconds(_mine(record))))
    return [
        Goal("MALoRA step / compiled floor, 7B shape", "≤", 1.10, over("floor-compiled")),
        Goal("MALoRA step / compiled plain LoRA r=64", "≤", 0.95, over("lora-plain-compiled")),
        Goal("PEFT LoRA as it comes / MALoRA", "≥", 1.7, large and times(_named(large, "peft-lora"))),
        Goal("MoLoRA by the loop over experts of public code / MALoRA", "≥", 10,
             large and times(_named(large, "molora-loop"))),
        Goal("MoLoRA by a good dispatch / MALoRA", "≥", 1.2, times(fastest("molora-sorted"))),
        Goal("MoLoRA, LoRA (ours) through the same backend / compiled floor", "≤", 1.12,
             None if None in alike else max(alike)),
        Goal("peak memory of MALoRA / PEFT LoRA as it comes", "≤", 0.85, _ratio(*peaks) if len(peaks) == 2 else None),
        Goal("host synchronisations in a step", "=", 0, mine and mine["synchronisations"]),
        Goal("135M shape, 16 × 128, tokens a second / PEFT LoRA as it comes", "≥", 12,
             small and _ratio(seconds(_named(small, "peft-lora")), seconds(_mine(small)))),
        Goal("decode, tokens a second / PEFT LoRA as it comes, the least of all batches", "≥", 1.5,
             None if None in decoded else min(decoded, default=None)),
        Goal("MALoRA in fp8 / compiled floor, in bfloat16", "≤", 0.75,
             over("floor-compiled", large and _named(large, "malora-fp8-liger-captured"))),
    ]  # fmt: skip


def _mine(record: SpeedRecord) -> Row | None:
    return _fastest(record, lambda row: row["method"] == "malora")


def _sources(records: list[SpeedRecord]) -> tuple[SpeedRecord | None, SpeedRecord | None]:
    """The records that goals of training are read from: of a large model, and of a small one."""
    return _last(records, "llama2-7b", "train"), _last(records, "smollm2-135m", "train", batch=16, length=128)


def _last(records: list[SpeedRecord], shape: str, mode: str, **options: int) -> SpeedRecord | None:
    """Of the whole records of a kind that have MALoRA and most of what it is compared with, the last."""
    found = [
        r for r in records
        if (r.shape, r.mode) == (shape, mode) and r.complete and all(r.options[k] == v for k, v in options.items())
        and _mine(r) and seconds(_named(r, "peft-lora")) and seconds(_named(r, "floor-compiled"))
    ]  # fmt: skip
    return max(found, key=_compared, default=None)


def _compared(record: SpeedRecord) -> tuple[int, str, str]:
    """Sorts records by how much of what goals compare they have, and by their age."""
    rivals = sum(seconds(_named(record, name)) is not None for name in COMPARED)
    return rivals, record.provenance["time"], record.id


def goal_table(records: list[SpeedRecord]) -> str:
    """The goals, what was measured, and whether it was reached."""
    found = goals(records)
    if all(goal.measured is None for goal in found):
        return "The goals are set for a GPU and are not measured yet."
    words = {None: "", True: "yes", False: "**no**"}
    body = [
        [g.figure, f"{g.relation} {g.goal:g}", "not measured yet" if g.measured is None else _n(g.measured),
         words[g.reached]] for g in found
    ]  # fmt: skip
    table = tabulate(body, ["figure", "goal", "measured", "reached"], tablefmt="pipe", disable_numparse=True)
    sources = [r for r in _sources(records) if r]
    rows = "; ".join(
        f"{r.shape}: `{mine['name']}` on {r.provenance['device']}, record `{r.id}`, "
        f"steps timed: {len(mine['seconds']['step'])}"
        for r, mine in ((r, _mine(r)) for r in sources)
    )
    return f"{table}\n\nMALoRA is its fastest exact row. {rows}.".rstrip()


def fill_readme(readme: str, records: list[SpeedRecord]) -> str:
    """The README with the part between `<!-- speed -->` and `<!-- end -->` made anew."""
    text = goal_table(records)
    return re.sub(
        r"<!-- speed -->.*?<!-- end -->", lambda _: f"<!-- speed -->\n\n{text}\n\n<!-- end -->", readme, flags=re.DOTALL
    )


def figure4c(record: SpeedRecord) -> str:
    """Seconds of a training step by variant, as bars; SVG written by hand, so that its bytes are the record's alone."""
    rows = sorted(((seconds(row), row["name"]) for row in record.rows if seconds(row) is not None), reverse=True)
    left, width, height = 220, 560, 20
    scale = (width - 70) / rows[0][0]
    device = escape(record.provenance["device"])
    bars = [f'<text x="8" y="18" font-weight="bold">Seconds of a training step, {record.shape}, {device}</text>']
    for number, (step, name) in enumerate(rows):
        y = 30 + number * height
        fill = "#c44e52" if name.startswith("malora") else "#8c8c8c" if name.startswith("floor") else "#4c72b0"
        bars += [
            f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y + 2}" width="{step * scale:.1f}" height="{height - 5}" fill="{fill}"/>',
            f'<text x="{left + step * scale + 5:.1f}" y="{y + 13}">{step:.3g}</text>',
        ]
    size = f'width="{left + width}" height="{40 + len(rows) * height}"'
    style = 'font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', background, *bars, "</svg>"]) + "\n"
