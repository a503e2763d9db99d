"""The figures of speed that the project set itself, and what the records say of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from tabulate import tabulate

from bench.records.schema import SpeedRecord
from bench.report.speed.summary import (
    SpeedRow,
    by_work,
    compared,
    fastest,
    malora_row,
    named,
    newest,
    number,
    ratio,
    seconds,
)


@dataclass(frozen=True)
class Kind:
    """What a record has to be of for a goal to be read from it."""

    shape: str | None  # None: any
    mode: str
    against: str  # a row that it must have beside MALoRA's
    options: tuple[tuple[str, int], ...] = ()

    def is_of(self, record: SpeedRecord) -> bool:
        is_alike = self.mode == record.mode and self.shape in (None, record.shape) and record.complete
        is_asked = all(getattr(record.options, name) == value for name, value in self.options)
        return is_alike and is_asked and None not in (malora_row(record), seconds(named(record, self.against)))


LARGE = Kind("llama2-7b", "train", "floor-compiled")
SMALL = Kind("smollm2-135m", "train", "floor-compiled", (("batch", 16), ("length", 128)))
DECODE = Kind(None, "decode", "peft-lora")
UNKNOWN = "not measured"
Measure = Callable[[SpeedRecord], float | None]
RELATIONS = {"≤": (operator.le, max), "≥": (operator.ge, min), "=": (operator.eq, max)}  # and the worse of two figures


@dataclass(frozen=True)
class Goal:
    """A figure that the project set itself. `measure` gives None where a record does not have it."""

    figure: str
    relation: str  # of the measured figure to the goal
    goal: float
    kind: Kind
    measure: Measure

    def is_reached_by(self, value: float) -> bool:
        return RELATIONS[self.relation][0](value, self.goal)

    def worst(self, records: list[SpeedRecord]) -> float | None:
        values = [self.measure(record) for record in records]
        return None if None in values else RELATIONS[self.relation][1](values)


def _over(row: Callable[[SpeedRecord], SpeedRow | None], other: Callable[[SpeedRecord], SpeedRow | None]) -> Measure:
    """A row's step over another's."""
    return lambda record: ratio(seconds(row(record)), seconds(other(record)))


def _row(name: str) -> Callable[[SpeedRecord], SpeedRow | None]:
    return lambda record: named(record, name)


FLOOR = _row("floor-compiled")


def _good_dispatch(record: SpeedRecord) -> SpeedRow | None:
    return fastest(record, lambda row: row.name.startswith("molora-sorted"))


def _others_over_floor(record: SpeedRecord) -> float | None:
    """The slower of MoLoRA and of LoRA through the backend that MALoRA's row has."""
    mine = malora_row(record).name
    found = [_over(_row(mine.replace("malora", method, 1)), FLOOR)(record) for method in ("molora", "lora")]
    return None if None in found else max(found)


def _memory(record: SpeedRecord) -> float | None:
    peaks = [
        row and row.peak_bytes and row.peak_bytes.allocated for row in (malora_row(record), named(record, "peft-lora"))
    ]
    return ratio(*peaks)


# Of a record that has MALoRA. It stands there by its fastest exact row, and all figures are of that row.
GOALS = (
    Goal("MALoRA step / compiled floor, 7B shape", "≤", 1.10, LARGE, _over(malora_row, FLOOR)),
    Goal("MALoRA step / compiled plain LoRA r=64", "≤", 0.95, LARGE, _over(malora_row, _row("lora-plain-compiled"))),
    Goal("PEFT LoRA as it comes / MALoRA", "≥", 1.7, LARGE, _over(_row("peft-lora"), malora_row)),
    Goal("MoLoRA by the loop over experts of public code / MALoRA", "≥", 10, LARGE,
         _over(_row("molora-loop"), malora_row)),
    Goal("MoLoRA by a good dispatch / MALoRA", "≥", 1.2, LARGE, _over(_good_dispatch, malora_row)),
    Goal("MoLoRA, LoRA (ours) through the same backend / compiled floor", "≤", 1.12, LARGE, _others_over_floor),
    Goal("peak memory of MALoRA / PEFT LoRA as it comes", "≤", 0.85, LARGE, _memory),
    Goal("host synchronisations in a step", "=", 0, LARGE, lambda record: malora_row(record).synchronisations),
    Goal("135M shape, 16 × 128, tokens a second / PEFT LoRA as it comes", "≥", 12, SMALL,
         _over(_row("peft-lora"), malora_row)),
    Goal("decode, tokens a second / PEFT LoRA as it comes, the least of all batches", "≥", 1.5, DECODE,
         _over(_row("peft-lora"), malora_row)),
    Goal("MALoRA in fp8 / compiled floor, in bfloat16", "≤", 0.75, LARGE,
         _over(_row("malora-fp8-liger-captured"), FLOOR)),
)  # fmt: skip


def sources(records: list[SpeedRecord], kind: Kind) -> dict[str, list[list[SpeedRecord]]]:
    """What is read of a kind, by device; of records that stand together the worse figure counts.

    Of training: the last of the records that have most of what MALoRA is compared with, then each other record of as
    many tokens that was made by the same code or later. Of decoding: the last record of each batch, together.
    """
    found: dict[str, list[list[SpeedRecord]]] = {}
    for group in by_work([r for r in records if kind.is_of(r)]):
        found.setdefault(group[0].provenance.device, []).append(newest(group))
    if kind.mode == "decode":
        return {device: [[first for first, *_ in groups]] for device, groups in found.items()}
    return {device: [[r] for r in max(groups, key=lambda g: compared(g[0]))] for device, groups in found.items()}


def measured(goal: Goal, records: list[SpeedRecord]) -> dict[str, list[float]]:
    """The figure by device, of each of its sources that has it."""
    found = {device: [goal.worst(s) for s in of_device] for device, of_device in sources(records, goal.kind).items()}
    return {device: [v for v in values if v is not None] for device, values in found.items()}


def verdict(goal: Goal, values: list[float]) -> str:
    """Of all devices and records."""
    found = {goal.is_reached_by(value) for value in values}
    if not found:
        return UNKNOWN
    return "**not always**" if len(found) == 2 else "yes" if found == {True} else "**no**"


def goal_table(records: list[SpeedRecord]) -> str:
    """The goals, what was measured on each device, and whether it was reached."""
    found = [measured(goal, records) for goal in GOALS]
    devices = sorted({device for by_device in found for device, values in by_device.items() if values})
    if not devices:
        return "The goals are set for a GPU and are not measured yet."
    body = []
    for goal, by_device in zip(GOALS, found, strict=True):
        cells = [", ".join(_cell(goal, value) for value in by_device.get(device, [])) or UNKNOWN for device in devices]
        values = [value for of_device in by_device.values() for value in of_device]
        body.append([goal.figure, f"{goal.relation} {goal.goal:g}", *cells, verdict(goal, values)])
    table = tabulate(body, ["figure", "goal", *devices, "reached"], tablefmt="pipe", disable_numparse=True)
    text = "MALoRA is its fastest exact row. Each figure of a cell is of one record, in this order:"
    return "\n\n".join([table, text, "\n".join(_note(device, records) for device in devices)])


def _cell(goal: Goal, value: float) -> str:
    return number(value) if goal.is_reached_by(value) else f"**{number(value)}**"


def _note(device: str, records: list[SpeedRecord]) -> str:
    """Which records a device's figures are of."""
    found = [r for kind in (LARGE, SMALL, DECODE) for group in sources(records, kind).get(device, []) for r in group]
    rows = ((r, malora_row(r)) for r in found)
    texts = (f"`{r.id}` (`{row.name}`, steps timed: {len(row.seconds['step'])})" for r, row in rows)
    return f"- {device}: {', '.join(texts)}"


def front_page_goals(records: list[SpeedRecord]) -> str:
    """Return the README's table of goals."""
    return goal_table(records)
