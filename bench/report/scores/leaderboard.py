"""Leaderboards with a row per method and a column per task.

They show which differences are significant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from bench.experiments.methods import BASE
from bench.experiments.profiles import SWEEP_SEED, TUNING_SEED
from bench.experiments.registry import TableEntry
from bench.report import markdown
from bench.report.paper import paper
from bench.report.scores.document import Leaderboard
from bench.report.scores.selection import Rates, Selection, TableRow, difference, mixture_rows, spread
from bench.report.scores.training_loss import LAST_STEPS, loss_cell
from bench.report.stats import LEVEL, POWER, Difference, Spread, holm
from bench.report.two_groups import smaller_group
from tasks import TASKS


@dataclass(frozen=True)
class Verdict:
    """A row's comparison with the reference row.

    Attributes:
        difference: None if the two rows have no seed in common.
        p: Corrected by Holm for all comparisons of the table; see `compare_rows`.
    """

    difference: Difference | None
    p: float = 1.0

    @property
    def is_significant(self) -> bool:
        """True if the corrected p is below 5%."""
        return self.difference is not None and self.p < 1 - LEVEL

    @property
    def word(self) -> str:
        """The outcome in a few words."""
        if self.difference is None:
            return "no seed in common"
        if not self.is_significant:
            return "not distinguishable"
        word = "worse" if self.difference.value < 0 else "better"
        return f"{word} on these items" if self.difference.items_only else word

    def in_short(self) -> str:
        """Return the outcome and, if it is significant, its p."""
        return f"{self.word}, p={self.p:.2g}" if self.is_significant else self.word

    def in_full(self, detailed: bool) -> str:
        """Return the outcome with its interval and p.

        If detailed, it also has the effect size and the power.
        """
        d = self.difference
        if d is None:
            return self.word
        text = f"{self.word}: {d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}], p={self.p:.2g}"
        return text + (f", h={d.effect:+.2f}, ≥{d.smallest:.1f}" if detailed else "")


@dataclass(frozen=True)
class Standings:
    """The rows of a leaderboard at given learning rates, and their comparison.

    Attributes:
        base: Rows of the untrained base model.
        rows: All other rows, in the order of the table.
        tasks: Names of the tasks, in the mixture's order.
        reference: The row that the others are compared with; None without a score.
        verdicts: Comparison with the reference, by a row's title. Rows without a score have none.
    """

    base: list[TableRow]
    rows: list[TableRow]
    tasks: list[str]
    reference: TableRow | None
    verdicts: dict[str, Verdict]

    @property
    def scored(self) -> list[TableRow]:
        """The rows with a score, without the base."""
        return [row for row in self.rows if row.records]


def standings(selection: Selection, rates: Rates) -> Standings:
    """Return the rows of a leaderboard and their comparison.

    Args:
        selection: The records.
        rates: Learning rate by tuning group.
    """
    rows = selection.rows(rates)
    scored = [row for row in rows if row.records]
    reference = _reference(selection, scored)
    base = selection.rows({BASE: None}, [TableEntry(BASE)])
    verdicts = compare_rows(scored, reference, spread(mixture_rows(selection, rates)), _is_fixed(selection, reference))
    return Standings(base, rows, _tasks(scored), reference, verdicts)


def leaderboard(selection: Selection, rates: Rates, mark_partial_sweeps: bool = False) -> Leaderboard:
    """Return the full leaderboard, with the paper's rows.

    Args:
        selection: The records.
        rates: Learning rate by tuning group.
        mark_partial_sweeps: Whether a method that was tried at fewer rates than the others says so.
    """
    experiment = selection.experiment
    found = standings(selection, rates)
    tasks, best, verdicts = found.tasks, found.reference, found.verdicts
    titles = [TASKS[task].title for task in tasks]
    partly = _partial_sweeps(selection) if mark_partial_sweeps else {}
    figures = paper().get(experiment.name, {})
    lines: list[tuple[TableRow | None, list[str]]] = []
    for row in [*found.base, *found.rows]:
        notes = [_name(selection, best) if row is best else "", _broken(row), partly.get(row.method, "")]
        if row.title in verdicts:
            notes[0] = verdicts[row.title].in_full(detailed=not experiment.both_rates)
        notes.append(_apart(row))
        lines.append((row, _cells(row, tasks, best, notes if row.records else [_broken(row)])))
        if row.records and row.title in figures:
            theirs = figures[row.title]
            cells = [f"*{theirs[title]:.1f}*" if title in theirs else "" for title in titles]
            lines.append(
                (None, [f"*{row.title}, the paper's*", "", "", *cells, f"*{theirs['AVG']:.1f}*", "", "*1*", ""])
            )
    against = "against the best" if experiment.reference is None else f"against {experiment.reference}"
    head = ["method", "rate", "trainable", *titles, "mean", "training loss", "seeds", against]
    return Leaderboard(head, lines, _notes(selection, found, rates, against))


def short_leaderboard(selection: Selection, details: str) -> str:
    """Return a leaderboard of short cells for the README, without the paper's rows.

    Args:
        selection: The records. Each method is at its own learning rate.
        details: Path of the page with the full table.
    """
    found = standings(selection, selection.rates.tuned)
    tasks, best, verdicts = found.tasks, found.reference, found.verdicts
    body = []
    for row in [*found.base, *found.rows]:
        verdict = verdicts[row.title].in_short() if row.title in verdicts else ""
        notes = [_name(selection, best) if row is best else verdict, _broken(row)]
        scores = [f"{row.task_mean(task):.1f}" for task in tasks] if row.records else [""] * len(tasks)
        mean = str(row.mean) if row.records else ""
        body.append([row.title, *scores, mean, str(len(row.records)), ", ".join(filter(None, notes))])
    head = ["method", *(TASKS[task].title for task in tasks), "mean", "seeds", "against the best"]
    align = ["left", *["right"] * (len(head) - 2), "left"]
    note = (
        f"Mean ± half of a {LEVEL:.0%} interval. Each method has its own tuned learning rate. p is paired over seeds "
        f"and items, with Holm's correction over all pairs of rows. [Details and the paper's figures]({details})."
    )
    return f"{markdown.table(body, head, align)}\n\n{note}"


def _tasks(scored: Sequence[TableRow]) -> list[str]:
    """Return the tasks in the mixture's order, which single-task rows need not have."""
    if not scored:
        return []
    return list(min(scored, key=lambda row: row.entry.single_task).records[0].test or {})


def _reference(selection: Selection, scored: Sequence[TableRow]) -> TableRow | None:
    """Return the row that the others are compared with.

    It is the experiment's reference, or the best mean.
    """
    best = max(scored, key=lambda row: row.mean.value, default=None)
    return next((row for row in scored if row.title == selection.experiment.reference), best)


def _is_fixed(selection: Selection, reference: TableRow | None) -> bool:
    """Tell if the reference was fixed before its score was seen."""
    return reference is not None and reference.title == selection.experiment.reference


def _name(selection: Selection, reference: TableRow | None) -> str:
    return "reference" if _is_fixed(selection, reference) else "best"


def _cells(row: TableRow, tasks: Sequence[str], reference: TableRow | None, notes: Sequence[str]) -> list[str]:
    rate = "" if row.rate is None else f"{row.rate:g}"
    if not row.records:
        return [row.title, rate, *[""] * (len(tasks) + 4), *notes]
    return [
        row.title,
        rate,
        "" if row.trainable is None else f"{row.trainable:,}",
        *(f"{row.task_mean(task):.1f}" for task in tasks),
        str(row.mean),
        loss_cell(row, reference),
        str(len(row.records)),
        ". ".join(filter(None, notes)),
    ]


def _notes(selection: Selection, found: Standings, rates: Rates, against: str) -> str:
    is_fixed = _is_fixed(selection, found.reference)
    overs = {row.mean.over for row in found.scored}
    notes = [f"± is half a {LEVEL:.0%} interval over {' or '.join(sorted(overs))}."] if overs else []
    if "items" in overs:
        notes.append(
            "With one seed the interval does not cover the variation between runs. The test takes it from all rows of "
            "this mixture with several seeds, as if all methods varied alike. It is not paired over seeds where two "
            "rows have fewer than two in common."
            if spread(mixture_rows(selection, rates))
            else "With one seed neither the interval nor the test covers the variation between runs."
        )
    compared = (
        "all comparisons with it"
        if is_fixed
        else "all pairs of rows, because the best row is known only after its score is seen"
    )
    notes.append(
        f"{against[0].upper()}{against[1:]}: difference of the means in points with its {LEVEL:.0%} interval, paired "
        f"over seeds and items; p has Holm's correction over {compared}. *Italics* are the paper's own figures "
        f"({paper()['source']}), from another, larger model."
    )
    if any(loss_cell(row, None) for row in found.scored):
        notes.append(
            f"Training loss: nats per label token, mean over the last {LAST_STEPS} steps and over seeds, without the "
            f"balance loss. After the comma: less that of {'the reference' if is_fixed else 'the best row'}, paired "
            f"over seeds, with half a {LEVEL:.0%} interval that is not corrected. It tells how well the training data "
            "are fitted, not how well the method answers."
        )
    if any(_apart(row) for row in found.scored):
        notes.append(
            "Runs of a row are in two groups if one normal sample would not split so far in 95% of cases. The interval "
            "and the tests of such a row assume one group, and are too certain: with one run in five 2.5 standard "
            "deviations low, a 95% interval of five covers the mean in 77% of cases."
        )
    if not selection.experiment.both_rates:
        notes.append(
            "h is Cohen's effect size. ≥ is the smallest difference that this many seeds and items show in "
            f"{POWER:.0%} of such experiments, before Holm's correction."
        )
    return " ".join(notes)


def _apart(row: TableRow) -> str:
    """Name the runs that are a group of their own."""
    seeds = [row.records[i].config.seed for i in smaller_group([record.mean() or 0.0 for record in row.records])]
    if not seeds:
        return ""
    return f"Two groups of runs: seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} apart"


def _partial_sweeps(selection: Selection) -> dict[str, str]:
    """Return a note per method that was tried at fewer learning rates than another."""
    frame = selection.frame
    if (frame["seed"] == TUNING_SEED).any():
        return {}  # a search tries as many rates as it needs
    sweep = frame[frame["learning_rate"].notna() & (frame["seed"] == SWEEP_SEED)]
    every = sweep["learning_rate"].nunique()
    tried = sweep.groupby("method")["learning_rate"].nunique()
    return {method: f"**Best of {n} of {every} rates**" for method, n in tried.items() if n < every}


def _broken(row: TableRow) -> str:
    counts = Counter(record.status for record in row.broken)
    return ", ".join(f"{n} of {n + len(row.records)} runs {status}" for status, n in sorted(counts.items()))


def compare_rows(
    scored: Sequence[TableRow], reference: TableRow | None, between_seeds: Spread | None, is_fixed: bool
) -> dict[str, Verdict]:
    """Compare every other row with the reference, by title.

    With a reference that was fixed beforehand, p is corrected for the comparisons with it. The best row is chosen after
    its score is seen, so that there p is corrected for all pairs of rows: of tables of five equal methods 9.5% would
    otherwise call one worse.
    """
    if reference is None:
        return {}
    others = [row for row in scored if row is not reference]
    differences = [difference(reference, row, between_seeds) for row in others]
    among_others = [] if is_fixed else [difference(*pair, between_seeds) for pair in combinations(others, 2)]
    adjusted = iter(holm([d.p for d in (*differences, *among_others) if d]))
    return {
        row.title: Verdict(d, next(adjusted)) if d else Verdict(None)
        for row, d in zip(others, differences, strict=True)
    }
