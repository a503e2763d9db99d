"""The project's goals for speed, and whether the records reach them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.records.speed_schema import SpeedRecord, SpeedRow
from bench.report.markdown import code, number, table, text
from bench.report.speed.summary import (
    COMPILED_BACKBONE,
    PEFT_LORA,
    by_work,
    compared,
    fastest,
    malora_row,
    named,
    newest,
    ratio,
    seconds,
)


@dataclass(frozen=True)
class RecordFilter:
    """The records that a goal is measured on.

    Attributes:
        shape: Shape of the backbone; None for any.
        mode: Mode of the record.
        against: Row that the record must have, besides MALoRA's.
        options: Options that the record must have.
    """

    shape: str | None
    mode: str
    against: str
    options: tuple[tuple[str, int], ...] = ()

    def accepts(self, record: SpeedRecord) -> bool:
        """Return whether a goal can be measured on the record."""
        is_alike = self.mode == record.mode and self.shape in (None, record.shape) and record.complete
        is_asked = all(getattr(record.options, name) == value for name, value in self.options)
        return is_alike and is_asked and None not in (malora_row(record), seconds(named(record, self.against)))


TRAINING_7B = RecordFilter("llama2-7b", "train", COMPILED_BACKBONE)
TRAINING_135M = RecordFilter("smollm2-135m", "train", COMPILED_BACKBONE, (("batch", 16), ("length", 128)))
DECODE = RecordFilter(None, "decode", PEFT_LORA)
UNKNOWN, REACHED = "not measured", "yes"
# By sign: the comparison of a figure with its goal, and the worse of several figures.
Worse = Callable[[list[float]], float]
RELATIONS: dict[str, tuple[Callable[[float, float], bool], Worse]] = {
    "≤": (operator.le, max),
    "≥": (operator.ge, min),
    "=": (operator.eq, max),
}
SelectRow = Callable[[SpeedRecord], SpeedRow | None]
Measure = Callable[[SpeedRecord], float | None]


@dataclass(frozen=True)
class Goal:
    """A figure and the value that the project wants it to have.

    Attributes:
        figure: Name of the figure.
        relation: Sign between the measured figure and the goal, one of `RELATIONS`.
        goal: The value to reach.
        records: The records to measure the figure on.
        measure: Computes the figure of a record; None if the record does not have it.
        on_front_page: Whether the README shows the goal.
    """

    figure: str
    relation: str
    goal: float
    records: RecordFilter
    measure: Measure
    on_front_page: bool = False

    def is_reached_by(self, value: float) -> bool:
        """Return whether a measured value reaches the goal."""
        return RELATIONS[self.relation][0](value, self.goal)

    def worst_value(self, values: list[float]) -> float:
        """Return the value that is furthest from the goal."""
        return RELATIONS[self.relation][1](values)

    def worst(self, records: list[SpeedRecord]) -> float | None:
        """Return the worst figure of some records; None if one of them does not have it."""
        values = [value for record in records if (value := self.measure(record)) is not None]
        return self.worst_value(values) if len(values) == len(records) else None


def _step_ratio(above: SelectRow, below: SelectRow) -> Measure:
    """Measure the ratio of two rows' step times."""
    return lambda record: ratio(seconds(above(record)), seconds(below(record)))


def _row(name: str) -> SelectRow:
    return lambda record: named(record, name)


def _grouped_gemm_row(record: SpeedRecord) -> SpeedRow | None:
    return fastest(record, lambda row: row.name.startswith("molora-sorted"))


def _other_methods(record: SpeedRecord) -> float | None:
    """Measure the slower of MoLoRA and LoRA over the frozen backbone.

    Both have the backend of MALoRA's row.
    """
    malora = malora_row(record)
    if malora is None:
        return None
    rows = [_row(malora.name.replace("malora", method, 1)) for method in ("molora", "lora")]
    ratios = [value for row in rows if (value := _step_ratio(row, _row(COMPILED_BACKBONE))(record)) is not None]
    return max(ratios) if len(ratios) == len(rows) else None


def _memory(record: SpeedRecord) -> float | None:
    """Measure MALoRA's peak allocated memory over that of PEFT's LoRA."""
    return ratio(_allocated(malora_row(record)), _allocated(named(record, PEFT_LORA)))


def _allocated(row: SpeedRow | None) -> float | None:
    return None if row is None or row.peak_bytes is None else row.peak_bytes.allocated


def _synchronisations(record: SpeedRecord) -> float | None:
    row = malora_row(record)
    return None if row is None else row.synchronisations


# Steps are training steps unless a figure says otherwise. MALoRA is represented by its fastest exact row.
GOALS = (
    Goal("step: MALoRA / compiled frozen backbone", "≤", 1.10, TRAINING_7B,
         _step_ratio(malora_row, _row(COMPILED_BACKBONE)), on_front_page=True),
    Goal("step: MALoRA / compiled LoRA r=64 in bfloat16", "≤", 0.95, TRAINING_7B,
         _step_ratio(malora_row, _row("lora-plain-compiled"))),
    Goal("step: PEFT LoRA out of the box / MALoRA", "≥", 1.7, TRAINING_7B,
         _step_ratio(_row(PEFT_LORA), malora_row), on_front_page=True),
    Goal("step: MoLoRA by the expert loop / MALoRA", "≥", 10, TRAINING_7B,
         _step_ratio(_row("molora-loop"), malora_row), on_front_page=True),
    Goal("step: MoLoRA by grouped GEMM / MALoRA", "≥", 1.2, TRAINING_7B, _step_ratio(_grouped_gemm_row, malora_row)),
    Goal("step: MoLoRA and LoRA (ours), by MALoRA's backend / compiled frozen backbone", "≤", 1.12, TRAINING_7B,
         _other_methods),
    Goal("peak memory: MALoRA / PEFT LoRA out of the box", "≤", 0.85, TRAINING_7B, _memory, on_front_page=True),
    Goal("host synchronisations per step", "=", 0, TRAINING_7B, _synchronisations),
    Goal("tokens per second, 135M shape, 16 × 128: MALoRA / PEFT LoRA out of the box", "≥", 12, TRAINING_135M,
         _step_ratio(_row(PEFT_LORA), malora_row)),
    Goal("tokens per second in decode, worst batch size: MALoRA / PEFT LoRA out of the box", "≥", 1.5, DECODE,
         _step_ratio(_row(PEFT_LORA), malora_row)),
    Goal("step: MALoRA in fp8 / compiled frozen backbone in bfloat16", "≤", 0.75, TRAINING_7B,
         _step_ratio(_row("malora-fp8-liger-captured"), _row(COMPILED_BACKBONE)), on_front_page=True),
)  # fmt: skip


def sources(records: list[SpeedRecord], wanted: RecordFilter) -> dict[str, list[list[SpeedRecord]]]:
    """Return by device the groups of records that one figure each is measured on.

    In training every group is one record. The first is the newest record with the most rows that MALoRA is compared
    with. The others are the other `newest` records of the same workload. In decode there is one group, with the newest
    record of each batch size: the worst of them counts.
    """
    found: dict[str, list[list[SpeedRecord]]] = {}
    for group in by_work([r for r in records if wanted.accepts(r)]):
        found.setdefault(group[0].provenance.device, []).append(newest(group))
    if wanted.mode == "decode":
        return {device: [[first for first, *_ in groups]] for device, groups in found.items()}
    return {device: [[r] for r in max(groups, key=lambda g: compared(g[0]))] for device, groups in found.items()}


def measured(goal: Goal, records: list[SpeedRecord]) -> dict[str, list[float]]:
    """Return the measured figures of a goal by device."""
    found = {device: [goal.worst(s) for s in of_device] for device, of_device in sources(records, goal.records).items()}
    return {device: [v for v in values if v is not None] for device, values in found.items()}


def count_reached(records: list[SpeedRecord]) -> tuple[int, int]:
    """Return how many goals all their records reach, and how many goals are measured."""
    found = [(goal, [v for values in measured(goal, records).values() for v in values]) for goal in GOALS]
    verdicts = [verdict(goal, values) for goal, values in found if values]
    return verdicts.count(REACHED), len(verdicts)


def verdict(goal: Goal, values: list[float]) -> str:
    """Say whether all measured values reach the goal."""
    found = {goal.is_reached_by(value) for value in values}
    if not found:
        return UNKNOWN
    return "**not always**" if len(found) == 2 else REACHED if found == {True} else "**no**"


NOT_MEASURED = "The goals are set for a GPU and are not measured yet."


def goal_table(records: list[SpeedRecord]) -> str:
    """Return all goals with the figures of every device, and their records.

    The records that the goals are measured on are in a table.
    """
    goals = _goals_by_device(GOALS, records, lambda goal, values: ", ".join(_cell(goal, value) for value in values))
    if goals is None:
        return NOT_MEASURED
    note = (
        "MALoRA is represented by its fastest exact row. A step is a training step, at the 7B shape unless the figure "
        "names another. A cell has one figure per record, in the order of this table:"
    )
    return "\n\n".join([goals, note, _source_table(records)])


def front_page_goals(records: list[SpeedRecord]) -> str:
    """Return the goals that the README shows, with one figure per device.

    The figure is the worst of the records of its device.
    """
    shown = [goal for goal in GOALS if goal.on_front_page]
    goals = _goals_by_device(shown, records, lambda goal, values: _cell(goal, goal.worst_value(values), digits=3))
    if goals is None:
        return NOT_MEASURED
    note = (
        "Training at the 7B shape; each figure is the worst of the device's records. All goals, rows and records: "
        "[results/speed/table10.md](results/speed/table10.md)."
    )
    return f"{goals}\n\n{note}"


def _goals_by_device(
    goals: Sequence[Goal], records: list[SpeedRecord], cell: Callable[[Goal, list[float]], str]
) -> str | None:
    """Return a table of goals by devices; None if nothing is measured."""
    found = [measured(goal, records) for goal in goals]
    devices = sorted({device for by_device in found for device, values in by_device.items() if values})
    if not devices:
        return None
    body = []
    for goal, by_device in zip(goals, found, strict=True):
        of_devices = [by_device.get(device, []) for device in devices]
        cells = [cell(goal, values) if values else UNKNOWN for values in of_devices]
        every = [value for values in of_devices for value in values]
        body.append([goal.figure, f"{goal.relation} {goal.goal:g}", *cells, verdict(goal, every)])
    return table(body, ["figure", "goal", *map(text, devices), "reached"])


def _cell(goal: Goal, value: float, digits: int = 4) -> str:
    return number(value, digits) if goal.is_reached_by(value) else f"**{number(value, digits)}**"


def _source_table(records: list[SpeedRecord]) -> str:
    """Return a table of the records that the goals are measured on."""
    body = []
    found = [sources(records, wanted) for wanted in (TRAINING_7B, TRAINING_135M, DECODE)]
    for device in sorted({device for by_device in found for device in by_device}):
        for record in (r for by_device in found for group in by_device.get(device, []) for r in group):
            row = malora_row(record)
            assert row is not None, "RecordFilter accepts records with MALoRA only"
            body.append([text(device), code(record.id), code(row.name), len(row.seconds["step"])])
    head = ["device", "record", "MALoRA's row", "steps timed"]
    return table(body, head, ["left", "left", "left", "right"])
