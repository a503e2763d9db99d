"""Tables of records of whole training programs (`bench.speed --loop`)."""

from __future__ import annotations

import statistics

from bench.records.speed_schema import SpeedRecord, SpeedRow
from bench.report.markdown import code, number, table, text
from bench.report.speed.summary import (
    COMPILED_BACKBONE,
    PEFT_LORA,
    median_and_iqr,
    named,
    ratio,
    seconds,
    tokens_per_second,
)

DIGITS = 4  # significant digits of seconds
UNSLOTH = "unsloth-lora"
# Rows that others are divided by, and the title of that column.
COMPARED_WITH = {COMPILED_BACKBONE: "× compiled floor", PEFT_LORA: "× PEFT LoRA", UNSLOTH: "× Unsloth LoRA"}
NOTE = (
    "Seconds of an optimizer step by the wall clock, with the device synchronized around each step: forward and "
    "backward of all micro-batches, gradient clipping and AdamW, in a loop as a user writes it. Medians over all "
    "rounds; IQR is the interquartile range. Each round runs every program from its base model on, in alternating "
    "order. Peak memory is that of the whole program, with the base model, after its first step compiled what it "
    "compiles. The frozen floor has no adapter and no optimizer."
)


DISTRIBUTED_NOTE = (
    " On several GPUs each process trains as many tokens per step as a row on one GPU, and all begin a step at once. "
    "Seconds are those of the slowest process. Peak memory is the largest of a process. Power and loss are those of "
    "the first one. Tokens per second are those of all."
)


def loop_note(record: SpeedRecord) -> str:
    """Return how to read the table of a record."""
    return NOTE + DISTRIBUTED_NOTE if any(row.parallel for row in record.rows) else NOTE


def loop_table(record: SpeedRecord) -> str:
    """Return a table of the training programs of a record."""
    is_distributed = any(row.parallel for row in record.rows)
    others = {title: seconds(named(record, name)) for name, title in COMPARED_WITH.items()}
    others = {title: step for title, step in others.items() if step}
    about_head = ["row", "loop", "checkpointing", "base", *(["GPUs"] if is_distributed else [])]
    head = [*about_head, "step, s", "IQR, s", "tokens/s", *others, "allocated, GiB", "reserved, GiB", "kernels",
            "launches", "host syncs", "W", "loss", "note"]  # fmt: skip
    body = []
    for row in record.rows:
        about = [code(row.name), *(text(value or "") for value in (row.loop, row.checkpointing, row.base))]
        if is_distributed:
            about.append(str(row.world or 1))
        if seconds(row) is None:
            body.append([*about, *[""] * (len(head) - len(about_head) - 1), text(f"{row.status}: {row.reason}")])
        else:
            body.append([*about, *_cells(record, row, [*others.values()])])
    return table(body, head, ["left"] * 4 + ["right"] * (len(head) - 5) + ["left"])


def _cells(record: SpeedRecord, row: SpeedRow, others: list[float | None]) -> list[str]:
    """Return the cells of a row that ran. `others` are the steps that its own is divided by."""
    step = seconds(row)
    assert step is not None, "only rows that ran have cells"
    peak, counts = row.peak_bytes, [getattr(row, name) for name in ("kernels", "launches", "synchronisations")]
    return [
        number(step, DIGITS),
        number(median_and_iqr(row.seconds["step"])[1], 2),
        f"{tokens_per_second(record, row):,.0f}",
        *(number(ratio(step, other), 3) for other in others),
        *(f"{getattr(peak, kind) / 2**30:.1f}" if peak else "" for kind in ("allocated", "reserved")),
        *("" if count is None else f"{count:,}" for count in counts),
        f"{statistics.median(row.sensors['watts']):.0f}" if row.sensors.get("watts") else "",
        "" if row.loss is None else number(row.loss, DIGITS),
        "; ".join(filter(None, [row.package, row.reason])),
    ]
