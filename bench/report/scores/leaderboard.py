"""Leaderboards: methods by rows, tasks by columns, and which differences are real."""

from __future__ import annotations

from collections import Counter

from bench.experiments.methods import BASE
from bench.experiments.registry import SWEEP_SEED, Experiment, TableEntry
from bench.records.schema import Record
from bench.report.paper import paper
from bench.report.scores.document import Leaderboard
from bench.report.scores.selection import (
    TableRow,
    difference,
    entries_of,
    rows,
    spread,
)
from bench.report.stats import LEVEL, POWER, holm
from tasks import TASKS


def leaderboard(
    experiment: Experiment, records: list[Record], rates: dict[str, float], mark_partial_sweeps: bool = False
) -> Leaderboard:
    """Methods by rows, tasks by columns, and each tested against the experiment's reference or the best mean.

    With `mark_partial_sweeps`, a method that was tried at fewer rates than the others says so.
    """
    found = rows(records, entries_of(experiment, records), rates, experiment)
    scored = [row for row in found if row.records]
    # A single-task row has its parts' order of tasks, which need not be the mixture's.
    tasks = list(min(scored, key=lambda row: row.entry.single_task).records[0].test) if scored else []
    best = max(scored, key=lambda row: row.mean.value) if scored else None
    best = next((row for row in scored if row.title == experiment.reference), best)
    name = "best" if experiment.reference is None or best is None or best.title != experiment.reference else "reference"
    verdicts = _verdicts(scored, best, name, detailed=not experiment.both_rates)
    partly = _partly_swept(records) if mark_partial_sweeps else {}
    figures = paper().get(experiment.name, {})
    titles = [TASKS[t].title for t in tasks]
    lines = []
    for row in [*rows(records, [TableEntry(BASE)], {BASE: None}, experiment), *found]:
        if not row.records:
            lines.append(
                (row, [row.title, "" if row.rate is None else f"{row.rate:g}", *[""] * (len(tasks) + 3), _broken(row)])
            )
            continue
        parameters = row.records[0].parameters
        lines.append((row, [
            row.title, "" if row.rate is None else f"{row.rate:g}",
            f"{parameters.trainable:,}" if parameters else "",
            *(f"{row.task_mean(task):.1f}" for task in tasks),
            str(row.mean), len(row.records),
            ". ".join(filter(None, [verdicts.get(row.title, ""), _broken(row), partly.get(row.method)])),
        ]))  # fmt: skip
        if row.title in figures:
            theirs = figures[row.title]
            cells = [f"*{theirs[t]:.1f}*" if t in theirs else "" for t in titles]
            lines.append((None, [f"*{row.title}, the paper's*", "", "", *cells, f"*{theirs['AVG']:.1f}*", "*1*", ""]))
    against = "against the best" if experiment.reference is None else f"against {experiment.reference}"
    head = ["method", "rate", "trainable", *titles, "mean", "seeds", against]
    overs = {row.mean.over for row in scored}
    notes = [f"± is half a {LEVEL:.0%} interval over {' or '.join(sorted(overs))}."] if overs else []
    if "items" in overs:
        notes.append(
            "With one seed it does not know how much a run varies; the test takes that from the rows with several, as "
            "if all varied alike, and is not paired over seeds where there are not two in common."
            if spread(scored)
            else "With one seed neither it nor the test knows how much a run varies."
        )
    notes.append(
        f"{against[0].upper()}{against[1:]}: difference of the means in points with its 95% interval, paired over "
        "seeds and items, p corrected by Holm for the number of rows. *Italics* are the paper's own figures "
        f"({paper()['source']}): another, larger model."
    )
    if not experiment.both_rates:
        notes.append(
            f"h is Cohen's effect size; ≥ the smallest difference that so many seeds and items show in {POWER:.0%} of "
            "such experiments, before Holm's correction."
        )
    return Leaderboard(head, lines, " ".join(notes))


def _partly_swept(records: list[Record]) -> dict[str, str]:
    """By method that was tried at fewer rates than another, how many of them."""
    tried: dict[str, set[float]] = {}
    for record in records:
        if record.config.method != BASE and record.config.seed == SWEEP_SEED:
            tried.setdefault(record.config.method, set()).add(record.config.learning_rate)
    every = set().union(*tried.values())
    return {
        method: f"**Best of {len(rates)} of {len(every)} rates**" for method, rates in tried.items() if rates != every
    }


def _broken(row: TableRow) -> str:
    counts = Counter(record.status for record in row.broken)
    return ", ".join(f"{n} of {n + len(row.records)} runs {status}" for status, n in sorted(counts.items()))


def _verdicts(scored: list[TableRow], best: TableRow | None, name: str, detailed: bool) -> dict[str, str]:
    others = [row for row in scored if row is not best]
    runs_vary = spread(scored)
    differences = [difference(best, row, runs_vary) for row in others]
    adjusted = iter(holm([d.p for d in differences if d]))
    verdicts = {best.title: name} if best else {}
    for row, d in zip(others, differences, strict=True):
        if d is None:
            verdicts[row.title] = "no seed in common"
            continue
        p = next(adjusted)
        word = "not distinguishable" if p >= 1 - LEVEL else "worse" if d.value < 0 else "better"
        if d.items_only and p < 1 - LEVEL:
            word += " on these items"
        verdicts[row.title] = f"{word}: {d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}], p={p:.2g}"
        if detailed:
            verdicts[row.title] += f", h={d.effect:+.2f}, ≥{d.smallest:.1f}"
    return verdicts
