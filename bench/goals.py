"""The figures of speed that the project set itself, and what the records say of them."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, replace

from tabulate import tabulate

from bench.record import SpeedRecord
from bench.speed_rows import Row, fastest, latest, malora_row, named, number, ratio, seconds

# Rows of a large model's training that the goals compare MALoRA with.
COMPARED = ("lora-plain-compiled", "molora-loop", "molora-sorted-compiled", "malora-fp8-liger-captured")


@dataclass(frozen=True)
class Goal:
    """A figure that the project set itself. `measured` is None where no record has it."""

    figure: str
    relation: str  # of the measured figure to the goal
    goal: float
    measured: float | None
    later: tuple[float, ...] = ()  # the same figure in later records, of fewer rivals, in the order of their time

    def reached_by(self, value: float) -> bool:
        return {"≤": operator.le, "≥": operator.ge, "=": operator.eq}[self.relation](value, self.goal)

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return ""
        found = {self.reached_by(value) for value in (self.measured, *self.later)}
        return "**not always**" if len(found) == 2 else "yes" if found == {True} else "**no**"


def goals(records: list[SpeedRecord]) -> list[Goal]:
    """The goals, from one record of each kind: the last of those that have most of what MALoRA is compared with.

    MALoRA is its fastest exact row, and all figures of one record are of that row.
    """
    large, small = _sources(records)
    decodes = [r for r in records if r.mode == "decode" and malora_row(r) and named(r, "peft-lora")]
    found = _figures(large, small, latest(decodes))
    others = [_figures(record, None, []) for record in _later(records, large)]
    others += [_figures(None, record, []) for record in _later(records, small)]
    by_goal = ([goal.measured for goal in same if goal.measured is not None] for same in zip(*others, strict=True))
    return [replace(goal, later=tuple(later)) for goal, later in zip(found, by_goal, strict=True)] if others else found


def _figures(large: SpeedRecord | None, small: SpeedRecord | None, decodes: list[SpeedRecord]) -> list[Goal]:
    mine = large and malora_row(large)

    def times(other: Row | None) -> float | None:
        return ratio(seconds(other), seconds(mine))

    def over(name: str, row: Row | None = mine) -> float | None:
        return large and ratio(seconds(row), seconds(named(large, name)))

    dispatch = large and fastest(large, lambda row: row["name"].startswith("molora-sorted"))
    same = [mine and named(large, mine["name"].replace("malora", m, 1)) for m in ("molora", "lora")]
    alike = [over("floor-compiled", row) for row in same]
    peaks = [(row["peak_bytes"] or {}).get("allocated") for row in (mine, large and named(large, "peft-lora")) if row]
    decoded = [ratio(seconds(named(record, "peft-lora")), seconds(malora_row(record))) for record in decodes]
    return [
        Goal("MALoRA step / compiled floor, 7B shape", "≤", 1.10, over("floor-compiled")),
        Goal("MALoRA step / compiled plain LoRA r=64", "≤", 0.95, over("lora-plain-compiled")),
        Goal("PEFT LoRA as it comes / MALoRA", "≥", 1.7, large and times(named(large, "peft-lora"))),
        Goal("MoLoRA by the loop over experts of public code / MALoRA", "≥", 10,
             large and times(named(large, "molora-loop"))),
        Goal("MoLoRA by a good dispatch / MALoRA", "≥", 1.2, times(dispatch)),
        Goal("MoLoRA, LoRA (ours) through the same backend / compiled floor", "≤", 1.12,
             None if None in alike else max(alike)),
        Goal("peak memory of MALoRA / PEFT LoRA as it comes", "≤", 0.85, ratio(*peaks) if len(peaks) == 2 else None),
        Goal("host synchronisations in a step", "=", 0, mine and mine["synchronisations"]),
        Goal("135M shape, 16 × 128, tokens a second / PEFT LoRA as it comes", "≥", 12,
             small and ratio(seconds(named(small, "peft-lora")), seconds(malora_row(small)))),
        Goal("decode, tokens a second / PEFT LoRA as it comes, the least of all batches", "≥", 1.5,
             None if None in decoded else min(decoded, default=None)),
        Goal("MALoRA in fp8 / compiled floor, in bfloat16", "≤", 0.75,
             over("floor-compiled", large and named(large, "malora-fp8-liger-captured"))),
    ]  # fmt: skip


def _sources(records: list[SpeedRecord]) -> tuple[SpeedRecord | None, SpeedRecord | None]:
    """The records that goals of training are read from: of a large model, and of a small one."""
    return _last(records, "llama2-7b", "train"), _last(records, "smollm2-135m", "train", batch=16, length=128)


def _last(records: list[SpeedRecord], shape: str, mode: str, **options: int) -> SpeedRecord | None:
    """Of the whole records of a kind that have MALoRA and most of what it is compared with, the last."""
    found = [
        r for r in records
        if (r.shape, r.mode) == (shape, mode) and all(r.options[k] == v for k, v in options.items())
        and _can_be_compared(r) and seconds(named(r, "peft-lora"))
    ]  # fmt: skip
    return max(found, key=compared, default=None)


def _later(records: list[SpeedRecord], source: SpeedRecord | None) -> list[SpeedRecord]:
    """Whole records of the same work and device that are younger than the source, the oldest first."""

    def work(r: SpeedRecord) -> tuple:
        return r.shape, r.mode, *(r.options[k] for k in ("batch", "length", "tokens")), r.provenance["device"]

    def age(r: SpeedRecord) -> tuple[str, str]:
        return r.provenance["time"], r.id

    alike = [r for r in records if source and work(r) == work(source) and _can_be_compared(r)]
    return sorted((r for r in alike if age(r) > age(source)), key=age)


def _can_be_compared(record: SpeedRecord) -> bool:
    return record.complete and malora_row(record) is not None and seconds(named(record, "floor-compiled")) is not None


def compared(record: SpeedRecord) -> tuple[int, str, str]:
    """Sorts records by how much of what goals compare they have, and by their age."""
    rivals = sum(seconds(named(record, name)) is not None for name in COMPARED)
    return rivals, record.provenance["time"], record.id


def goal_table(records: list[SpeedRecord]) -> str:
    """The goals, what was measured, and whether it was reached."""
    found = goals(records)
    if all(goal.measured is None for goal in found):
        return "The goals are set for a GPU and are not measured yet."
    body = [
        [g.figure, f"{g.relation} {g.goal:g}", "not measured yet" if g.measured is None else number(g.measured),
         ", ".join(number(value) if g.reached_by(value) else f"**{number(value)}**" for value in g.later), g.verdict]
        for g in found
    ]  # fmt: skip
    head = ["figure", "goal", "measured", "later, of fewer rivals", "reached"]
    if not any(g.later for g in found):
        for line in (head, *body):
            del line[3]
    table = tabulate(body, head, tablefmt="pipe", disable_numparse=True)
    sources = [r for r in _sources(records) if r]
    rows = "; ".join(
        f"{r.shape}: `{mine['name']}` on {r.provenance['device']}, record `{r.id}`, "
        f"steps timed: {len(mine['seconds']['step'])}"
        for r, mine in ((r, malora_row(r)) for r in sources)
    )
    later = "; ".join(
        f"{r.id.rpartition('-')[2]}: {len(malora_row(r)['seconds']['step'])}"
        for s in sources
        for r in _later(records, s)
    )
    note = f" Later records, and steps timed: {later}." if later else ""
    return f"{table}\n\nMALoRA is its fastest exact row. {rows}.{note}".rstrip()


def fill_readme(readme: str, records: list[SpeedRecord]) -> str:
    """The README with the part between `<!-- speed -->` and `<!-- end -->` made anew."""
    text = goal_table(records)
    return re.sub(
        r"<!-- speed -->.*?<!-- end -->", lambda _: f"<!-- speed -->\n\n{text}\n\n<!-- end -->", readme, flags=re.DOTALL
    )
