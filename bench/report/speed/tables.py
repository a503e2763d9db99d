"""Pages of the speed benchmark, with its records as Markdown tables.

The same records give the same bytes.
"""

from __future__ import annotations

import statistics

from bench.records.speed_schema import SpeedRecord, SpeedRow
from bench.report.markdown import code, number, table, text
from bench.report.paper import paper
from bench.report.speed.figure4c import figure4c
from bench.report.speed.goals import goal_table
from bench.report.speed.loop_goals import loop_goal_table
from bench.report.speed.loop_tables import loop_note, loop_table
from bench.report.speed.summary import (
    COMPILED_BACKBONE,
    PEFT_LORA,
    age,
    by_work,
    compared,
    fastest,
    malora_row,
    median_and_iqr,
    named,
    ratio,
    seconds,
    shown,
    tokens_per_second,
)

# Backends whose work grows with k·r; that of the others grows with N·r.
_SPARSE = ("dispatch", "sorted")
_PHASES = ("forward", "backward", "optimizer")
# Rows of the frozen backbone that others are divided by, and the title of that column.
_BACKBONES = {
    COMPILED_BACKBONE: "× compiled backbone",
    "floor-captured": "× captured backbone",
    "floor": "× eager backbone",
}
DIGITS = 4  # significant digits of seconds and of ratios between records
MAX_KERNEL_NAME = 60  # characters of a kernel's name in a table


def pages(records: list[SpeedRecord]) -> dict[str, str]:
    """Return the generated files of a folder of records by name.

    There is "table10.md" and, if training was measured, "figure4c.svg" of the record with the largest step.
    """
    if not records:
        return {}
    parts = ["# Speed (the paper's Table 10 and Figure 4c)", goal_table(records)]
    if loop_goals := loop_goal_table(records):
        parts.append(loop_goals)
    for group in by_work(records):
        in_full = shown(group)
        parts += map(section, in_full)
        if rest := [r for r in group if r not in in_full]:
            parts.append(_others(rest))
    found = {"table10.md": "\n\n".join(parts) + "\n"}
    trained = [r for r in shown(records) if r.mode == "train" and fastest(r, lambda row: True)]
    if trained:
        largest = max(trained, key=lambda r: (r.options.flops, compared(r)))
        found["figure4c.svg"] = figure4c(largest)
    return found


def _others(records: list[SpeedRecord]) -> str:
    """Return a table of the records of a workload that are not shown in full, by age."""
    body = []
    for r in sorted(records, key=age):
        step = seconds(malora_row(r))
        ratios = [number(ratio(step, seconds(named(r, name))), DIGITS) for name in (COMPILED_BACKBONE, PEFT_LORA)]
        commit = (r.provenance.commit or "unknown")[:12]
        body.append(
            [f"`{r.id}`", f"`{commit}`", str(r.options.rounds), str(len(r.rows)), number(step, DIGITS), *ratios]
        )
    head = ["record", "commit", "rounds", "rows", "MALoRA's step, s", "× compiled backbone", "× PEFT LoRA"]
    listed = table(body, head, ["left", "left", *["right"] * 5])
    return f"Other records of the same workload, of earlier code or with the same rows:\n\n{listed}"


def section(record: SpeedRecord) -> str:
    """Return what one call measured, and how to read it."""
    sweep = record.mode == "layer"
    names = {"layer": f"one linear layer, {record.options.sweep}", "loop": "whole training programs"}
    work = names.get(record.mode, record.mode)
    title = f"## {text(record.shape)}, {work}, {text(record.provenance.device)}"
    if sweep:
        parts = [title, _intro(record), _sweep_table(record), _SWEEP_NOTE, *_crossovers(record)]
    elif record.mode == "loop":
        parts = [title, _intro(record), loop_table(record), loop_note(record)]
    else:
        parts = [title, _intro(record), _model_table(record), _model_note(record), *_longest_kernels(record)]
    return "\n\n".join(parts)


def _intro(record: SpeedRecord) -> str:
    o, p = record.options, record.provenance
    step = f"{o.tokens:,} tokens per step in micro-batches of {o.batch} × {o.length}"
    work = {
        "train": step,
        "loop": step,
        "prefill": f"{o.batch} × {o.length} tokens per pass",
        "decode": f"{o.tokens} new tokens after a prompt of {o.length}, batch size {o.batch}",
        "layer": ("" if o.sweep == "tokens" else f"{o.tokens:,} tokens, ") + "forward and backward",
    }[record.mode]
    before, after = record.peak_rates["before"], record.peak_rates["after"]
    matmul = [rates.matrix_flops_per_second / 1e12 for rates in (before, after)]
    copy = [rates.copy_bytes_per_second / 1e12 for rates in (before, after)]
    rounds = "1 round" if o.rounds == 1 else f"{o.rounds} rounds"
    packages = {name: p.packages.get(name) or "unknown" for name in ("torch", "transformers", "peft")}
    versions = ", ".join(f"{name} {text(version)}" for name, version in packages.items())
    lines = [
        f"{work[0].upper()}{work[1:]}, on {text(p.device)}; {versions}; commit {code((p.commit or 'unknown')[:12])}. "
        f"Random weights, dropout {o.dropout:g}, {rounds}. The device's peak rates before and after: "
        f"matmul {matmul[0]:.3g} and {matmul[1]:.3g} TFLOP/s, copy {copy[0]:.3g} and {copy[1]:.3g} TB/s."
    ]
    if p.cuda is None:
        lines.append("**Measured on a CPU**: this shows that the command works, and says nothing about a GPU.")
    if record.complete and o.layers:
        lines.append(f"**The backbone had {o.layers} layers** (`--layers`), fewer than {record.shape} has.")
    if not record.complete:
        lines.append(f"**The backbone was cut to {o.layers} layers** (`--layers`): the figures mean nothing.")
    return "\n\n".join(lines)


def _model_table(record: SpeedRecord) -> str:
    """Return a table of the variants of a whole model.

    The paper's rows are below if it is a training record.
    """
    train = record.mode == "train"
    backbones = {title: seconds(named(record, name)) for name, title in _BACKBONES.items()}
    backbones = {title: step for title, step in backbones.items() if step}
    head = ["variant", *(_PHASES if train else ()), "step, s", "IQR, s", "tokens/s", *backbones, "× PEFT LoRA",
            "share of peak", "allocated, GiB", "reserved, GiB", "MHz", "W", "kernels", "launches",
            "host syncs", "trainable", "note"]  # fmt: skip
    body = []
    for row in record.rows:
        if seconds(row) is None:
            body.append([text(row.name), *[""] * (len(head) - 2), text(f"{row.status}: {row.reason}")])
        else:
            body.append(_model_cells(record, row, [*backbones.values(), seconds(named(record, PEFT_LORA))]))
    if train:
        body += _paper_rows(len(head), len(backbones))
    return table(body, head, ["left", *["right"] * (len(head) - 2), "left"])


def _model_cells(record: SpeedRecord, row: SpeedRow, others: list[float | None]) -> list[str]:
    """Return the cells of a variant that ran.

    `others` are the steps that its own is divided by.
    """
    step = seconds(row)
    assert step is not None, "only rows that ran have cells"
    peak_rate = max(rates.matrix_flops_per_second for rates in record.peak_rates.values())
    share = record.options.flops and record.options.flops / step / peak_rate
    peak_bytes, sensors = row.peak_bytes, row.sensors
    counts = [getattr(row, name) for name in ("kernels", "launches", "synchronisations")]
    return [
        text(row.name),
        *([number(seconds(row, phase), DIGITS) for phase in _PHASES] if record.mode == "train" else []),
        number(step, DIGITS),
        number(median_and_iqr(row.seconds["step"])[1], 2),
        f"{tokens_per_second(record, row):,.0f}",
        *(number(ratio(step, other), 3) for other in others),
        "" if share is None else f"{share:.1%}",
        *(f"{getattr(peak_bytes, kind) / 2**30:.1f}" if peak_bytes else "" for kind in ("allocated", "reserved")),
        *(f"{statistics.median(sensors[name]):.0f}" if sensors.get(name) else "" for name in ("clock_mhz", "watts")),
        *("" if count is None else f"{count:,}" for count in counts),
        "" if row.trainable is None else f"{row.trainable:,}",
        text(row.reason or ""),
    ]


def _paper_rows(columns: int, backbones: int) -> list[list[str]]:
    """Return the paper's own rows for a table of that many columns."""
    theirs = paper()["table10"]
    rows = []
    for name, row in theirs.items():
        cells = [f"*{row[phase + '_s']}*" for phase in (*_PHASES, "step")]
        cells += ["", f"*{1e6 / row['us_per_token']:,.0f}*", *[""] * backbones]
        cells.append(f"*{row['step_s'] / theirs['LoRA']['step_s']:.3g}*")
        rows.append([f"*{name}, the paper's*", *cells, *[""] * (columns - len(cells) - 1)])
    return rows


def _model_note(record: SpeedRecord) -> str:
    text = (
        "Figures are medians over all rounds; IQR is the interquartile range of a step. Variants were measured in "
        "turn, in alternating order. A backbone is the frozen model without an adapter, forward and backward. The "
        "share of the peak rate counts the frozen backbone's matmul operations only. Peak memory includes the frozen "
        "weights and the variant's own. MHz and W are medians of the device's clock and power while steps ran. Host "
        "syncs count the times per step that the host waited for the device."
    )
    if record.mode == "train":
        text += (
            " A captured step has forward and backward in one CUDA graph. The rows in *italics* are the paper's "
            f"({paper()['source']}): {paper()['table10_source']}."
        )
    return text


def _longest_kernels(record: SpeedRecord) -> list[str]:
    """Return tables of the kernels that took longest.

    They are those of MALoRA's fastest row, and of the compiled backbone.
    """
    parts = []
    for row in (malora_row(record), named(record, COMPILED_BACKBONE)):
        if row is None or not row.where:
            continue
        busy = sum(taken for _, _, taken in row.where)
        body = [[code(name[:MAX_KERNEL_NAME]), f"{calls:,}", f"{1e3 * taken:.1f}"] for name, calls, taken in row.where]
        listed = table(body, ["kernel", "calls", "ms"], ["left", "right", "right"])
        parts.append(f"The longest kernels of a step of {code(row.name)}, which take {busy:.3g} s:\n\n{listed}")
    return parts


_SWEEP_NOTE = "Median milliseconds of a forward and backward pass. Captured rows are CUDA graphs; nothing is compiled."


def _sweep_table(record: SpeedRecord) -> str:
    """Return milliseconds by value and backend, the fastest of each value in bold."""
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
        body.append([text(value), *cells])
    head = [text(record.options.sweep or ""), *map(text, names)]
    return table(body, head, ["right"] * len(head))


def _crossovers(record: SpeedRecord) -> list[str]:
    """Return a line per method with the values at which a sparse row wins.

    A sparse row wins if it is the fastest that ran.
    """
    lines = []
    for method in dict.fromkeys(row.method for row in record.rows):
        won: dict[str, list[str]] = {}
        for value in dict.fromkeys(row.value for row in record.rows):
            best = _fastest_at(record, method, value)
            if best and best.backend in _SPARSE:
                won.setdefault(best.name, []).append(str(value))
        where = [f"`{name}` is the fastest at {', '.join(values)}" for name, values in won.items()]
        lines.append(f"Crossover, {method} by {record.options.sweep}: {'; '.join(where) or 'no sparse row wins'}.")
    return lines


def _fastest_at(record: SpeedRecord, method: str | None, value: int | None) -> SpeedRow | None:
    return fastest(record, lambda row: (row.method, row.value) == (method, value))
