"""Compare this machine's means with the published ones."""

from __future__ import annotations

from bench.experiments.profiles import PROFILES
from bench.experiments.registry import Experiment
from bench.records.schema import Record
from bench.report.scores.selection import (
    entries_of,
    rows,
    select_comparable,
    tuned_rates,
)


def reproduction(experiment: Experiment, mine: list[Record], published: list[Record], profile: str) -> str:
    """One line a method and rate: whether this machine's mean is where another run of the published one would fall."""
    theirs, _ = select_comparable(published, experiment)
    if not theirs:
        return "Nothing is published for this profile yet."
    entries = entries_of(experiment, theirs)
    own, _ = tuned_rates(experiment, published)
    at_paper = dict.fromkeys(
        (entry.tuning_group for entry in entries), PROFILES[profile].on(experiment.mixture).paper_rate
    )
    lines = []
    for label, rates in (
        ("its own rate", own if experiment.both_rates else at_paper | own),
        ("the paper's rate", at_paper if experiment.both_rates else {}),
    ):
        ours = {row.title: row for row in rows(mine, entries, rates, experiment) if row.records}
        for row in rows(theirs, entries, rates, experiment):
            if row.title not in ours or not row.records:
                continue
            if row.mean.over == "items":
                lines.append(
                    f"- {row.title} at {label}, {row.rate:g}: {ours[row.title].mean.value:.1f} here, "
                    f"{row.mean.value:.1f} published; one published seed gives no interval to be within."
                )
                continue
            made, known = ours[row.title].mean, row.mean
            away, allowed = made.value - known.value, known.interval_of_another(made.seeds)
            verdict = "reproduced" if abs(away) <= allowed else "not reproduced"
            lines.append(
                f"- {row.title} at {label}, {row.rate:g}: **{verdict}**: {made.value:.1f} here, "
                f"{known.value:.1f} published, "
                f"{away:+.1f} where ±{allowed:.1f} is within the published interval."
            )
    note = (
        "The interval is for another mean of as many seeds as were run here: wider than that of the published mean, "
        "which a faithful repetition misses far more often than in one case of twenty."
    )
    here, there = ({r.config.model_hash[:12] for r in records} for records in (mine, theirs))
    if here.isdisjoint(there):
        note += (
            f" These runs have another base, `{'`, `'.join(sorted(here))}` for the published "
            f"`{'`, `'.join(sorted(there))}`. One that is trained on the spot comes out otherwise on another "
            "processor, and what is trained on it, too; the interval does not count that."
        )
    return "\n".join(lines) + f"\n\n{note}" if lines else "No method here is among the published ones."
