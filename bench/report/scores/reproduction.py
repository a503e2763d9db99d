"""Comparison of this machine's means with the published ones."""

from __future__ import annotations

import pandas as pd

from bench.report.scores.processors import differences, half_width, measured
from bench.report.scores.selection import Selection, TableRow, select
from tasks import TASKS


def reproduction(mine: Selection, published: pd.DataFrame) -> str:
    """Say whether this machine's means agree with the published ones.

    There is a verdict for each row and learning rate. A mean agrees if the runs are the published ones and moved no
    further than on other processors, or if it lies in the interval where another mean of the published runs would fall.
    """
    experiment = mine.experiment
    theirs = select(experiment, mine.profile, published)
    if theirs.frame.empty:
        return "Nothing is published for this profile yet."
    if differ := _tasks_scored_otherwise(mine, theirs):
        return (
            f"The published scores of {', '.join(differ)} are of another version of the scorer, so the means cannot be "
            "compared. The published page says what changed."
        )
    own = theirs.rates.tuned if experiment.both_rates else theirs.at_own_rate
    rates_by_label = {"its own rate": own}
    if experiment.both_rates:
        rates_by_label["the paper's rate"] = theirs.at_paper_rate
    lines = []
    for label, rates in rates_by_label.items():
        ours = {row.title: row for row in mine.rows(rates, theirs.entries) if row.records}
        lines += [_line(label, ours[row.title], row) for row in theirs.rows(rates) if row.records and row.title in ours]
    if not lines:
        return "No method here is among the published ones."
    return "\n".join(lines) + f"\n\n{_note(mine, theirs)}"


def _tasks_scored_otherwise(mine: Selection, theirs: Selection) -> list[str]:
    """Return the titles of the tasks whose scores are of different versions of the scorer."""
    here, there = (
        {task: score.version for record in selection.records for task, score in (record.test or {}).items()}
        for selection in (mine, theirs)
    )
    return sorted(TASKS[task].title for task in here.keys() & there.keys() if here[task] != there[task])


def _line(label: str, ours: TableRow, theirs: TableRow) -> str:
    here, there = ours.mean, theirs.mean
    start = f"- {theirs.title} at {label}, {theirs.rate:g}: "
    means = f"{here.value:.1f} here, {there.value:.1f} published"
    of_processors = _bound_of_processors(ours, theirs)
    if of_processors is not None and ours.outcomes == theirs.outcomes:
        return f"{start}**reproduced**: {means}, with the same answers in every run."
    away = here.value - there.value
    if of_processors and abs(away) <= of_processors:
        where = f"±{of_processors:.1f} is within the bound of other processors"
        return f"{start}**reproduced**: {means}, {away:+.1f} where {where}."
    if there.over == "items":
        return f"{start}{means}. One published seed gives no interval to compare with."
    allowed = there.interval_of_another(here.seeds)
    verdict = "reproduced" if abs(away) <= allowed else "not reproduced"
    more = f", but other processors give ±{of_processors:.1f}" if of_processors else ""
    return f"{start}**{verdict}**: {means}, {away:+.1f} where ±{allowed:.1f} is within the published interval{more}."


def _bound_of_processors(ours: TableRow, theirs: TableRow) -> float | None:
    """Return by how much the means of the same runs may differ between processors.

    It is 0 where that was not measured. None if the runs are others: of another base, or of other seeds.
    """
    if {record.config.id for record in ours.sources} != {record.config.id for record in theirs.sources}:
        return None
    return half_width(theirs.sources[0].config, len(theirs.records)) or 0.0


def _note(mine: Selection, theirs: Selection) -> str:
    note = (
        "The interval is that of another mean over the number of seeds that were run here. It is wider than the "
        "published mean's own interval, which a faithful repetition misses far more often than once in twenty times."
    )
    if any(differences(record.config) for record in mine.records):
        count = len(measured()["runs"])
        note += (
            " The bound of other processors is that of the same runs, at the same learning rate. It is from "
            f"{count} runs that were made again as on other processors (`docs/notes/2026-12-processors.md`); a mean "
            "misses it once in twenty times."
        )
    here, there = ({record.config.model_hash[:12] for record in selection.records} for selection in (mine, theirs))
    if here.isdisjoint(there):
        note += (
            f" These runs have another base, `{'`, `'.join(sorted(here))}` for the published "
            f"`{'`, `'.join(sorted(there))}`. So their scores may differ by more than the interval."
        )
    return note
