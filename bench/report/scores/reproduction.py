"""Comparison of this machine's means with the published ones."""

from __future__ import annotations

import pandas as pd

from bench.report.scores.selection import Selection, TableRow, select
from tasks import TASKS


def reproduction(mine: Selection, published: pd.DataFrame) -> str:
    """Say whether this machine's means agree with the published ones.

    There is a verdict for each row and learning rate. A mean agrees if it lies in the interval where another mean of
    the published runs would fall.
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
    if there.over == "items":
        return (
            f"{start}{here.value:.1f} here, {there.value:.1f} published. One published seed gives no interval to "
            "compare with."
        )
    away, allowed = here.value - there.value, there.interval_of_another(here.seeds)
    verdict = "reproduced" if abs(away) <= allowed else "not reproduced"
    return (
        f"{start}**{verdict}**: {here.value:.1f} here, {there.value:.1f} published, {away:+.1f} where ±{allowed:.1f} "
        "is within the published interval."
    )


def _note(mine: Selection, theirs: Selection) -> str:
    note = (
        "The interval is that of another mean over the number of seeds that were run here. It is wider than the "
        "published mean's own interval, which a faithful repetition misses far more often than once in twenty times."
    )
    here, there = ({record.config.model_hash[:12] for record in selection.records} for selection in (mine, theirs))
    if here.isdisjoint(there):
        note += (
            f" These runs have another base, `{'`, `'.join(sorted(here))}` for the published "
            f"`{'`, `'.join(sorted(there))}`. So their scores may differ by more than the interval."
        )
    return note
