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
from bench.records.task_scores import MAX_UNEVENNESS
from bench.report import markdown
from bench.report.paper import paper
from bench.report.scores.document import Leaderboard
from bench.report.scores.held_out import loss_rows, plain_accuracy
from bench.report.scores.selection import Rates, Selection, TableRow, difference, mixture_rows, spread
from bench.report.scores.training_loss import LAST_STEPS, loss_cell
from bench.report.stats import LEVEL, POWER, Difference, Mean, Spread, holm
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
        losses: Mean held-out loss with its comparison, by a row's title; empty if a record has none.
    """

    base: list[TableRow]
    rows: list[TableRow]
    tasks: list[str]
    reference: TableRow | None
    verdicts: dict[str, Verdict]
    losses: dict[str, tuple[Mean, Verdict | None]]

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
    is_fixed = _is_fixed(selection, reference)
    between_seeds = spread(mixture_rows(selection, rates))
    of_losses = loss_rows([*base, *scored])
    if not of_losses or reference is None:
        verdicts = compare_rows(scored, reference, between_seeds, is_fixed)
        return Standings(base, rows, _tasks(scored), reference, verdicts, {})
    by_title = {row.title: row for row in of_losses}
    scored_losses = [by_title[row.title] for row in scored]
    verdicts, loss_verdicts = compare_endpoints(
        (scored, reference, between_seeds),
        (scored_losses, by_title[reference.title], spread(scored_losses)),
        is_fixed=is_fixed,
    )
    losses = {title: (row.mean, loss_verdicts.get(title)) for title, row in by_title.items()}
    return Standings(base, rows, _tasks(scored), reference, verdicts, losses)


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
        lines.append((row, _cells(row, found, notes if row.records else [_broken(row)])))
        if row.records and row.title in figures:
            theirs = figures[row.title]
            cells = [f"*{theirs[title]:.1f}*" if title in theirs else "" for title in titles]
            cells += [f"*{theirs['AVG']:.1f}*", *[""] * bool(found.losses), "", "*1*", ""]
            lines.append((None, [f"*{row.title}, the paper's*", "", "", *cells]))
    against = "against the best" if experiment.reference is None else f"against {experiment.reference}"
    loss = ["held-out loss"] * bool(found.losses)
    head = ["method", "rate", "trainable", *titles, "mean", *loss, "training loss", "seeds", against]
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


def _cells(row: TableRow, found: Standings, notes: Sequence[str]) -> list[str]:
    rate = "" if row.rate is None else f"{row.rate:g}"
    has_losses = bool(found.losses)
    if not row.records:
        return [row.title, rate, *[""] * (len(found.tasks) + 4 + has_losses), *notes]
    return [
        row.title,
        rate,
        "" if row.trainable is None else f"{row.trainable:,}",
        *(_task_cell(row, task) for task in found.tasks),
        str(row.mean),
        *([_loss_cell(*found.losses[row.title])] if has_losses else []),
        loss_cell(row, found.reference),
        str(len(row.records)),
        ". ".join(filter(None, notes)),
    ]


def _task_cell(row: TableRow, task: str) -> str:
    accuracy = plain_accuracy(row, task)
    text = f"{row.task_mean(task):.1f}" + ("" if accuracy is None else f" ({accuracy:.1f})")
    return f"*{text}*, at floor" if task in row.at_floor else text


def _loss_cell(mean: Mean, verdict: Verdict | None) -> str:
    """Return a row's held-out loss and, but for the reference, its difference from it."""
    text = f"{mean.value:.3f}"
    if verdict is None or verdict.difference is None:
        return text
    d = verdict.difference
    return f"{text}, {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], p={verdict.p:.2g}"


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
    if selection.at_floor:
        notes.append(
            "At floor: a LoRA that is trained on the task alone is not above chance by three standard errors on "
            "validation. Such a task counts neither in the means nor in the comparisons."
        )
    if found.losses:
        notes.append(
            "Held-out loss: negative log-likelihood of the correct answers of the test sets in nats per label token, "
            "mean over tasks and seeds; lower is better. After the comma: less that of "
            f"{'the reference' if is_fixed else 'the row with the best score'}, with its {LEVEL:.0%} interval, paired "
            "over seeds and items. Its tests and those of the score are one family in Holm's correction."
        )
    if any(plain_accuracy(row, task) is not None for row in found.scored for task in found.tasks):
        notes.append(
            f"Where the largest class of a test set has more than {MAX_UNEVENNESS:g} times the items of an even split, "
            "the score is balanced accuracy, the mean recall of the classes. Plain accuracy is in brackets."
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


Endpoint = tuple[Sequence[TableRow], TableRow | None, Spread | None]  # rows, reference, variance between seeds


def compare_rows(
    scored: Sequence[TableRow], reference: TableRow | None, between_seeds: Spread | None, is_fixed: bool
) -> dict[str, Verdict]:
    """Compare every other row with the reference, by title; see `compare_endpoints`."""
    (verdicts,) = compare_endpoints((scored, reference, between_seeds), is_fixed=is_fixed)
    return verdicts


def compare_endpoints(*endpoints: Endpoint, is_fixed: bool) -> list[dict[str, Verdict]]:
    """Compare every other row with the reference, by endpoint and title. The endpoints are one family of tests.

    With a reference that was fixed beforehand, p is corrected for the comparisons with it. The best row is chosen after
    its score is seen, so that there p is corrected for all pairs of rows: of tables of five equal methods 9.5% would
    otherwise call one worse.
    """
    compared: list[list[tuple[TableRow, Difference | None]]] = []
    among_others: list[Difference | None] = []
    for rows, reference, between_seeds in endpoints:
        others = [row for row in rows if row is not reference] if reference else []
        compared.append([(row, difference(reference, row, between_seeds)) for row in others if reference])
        if not is_fixed:
            among_others += [difference(*pair, between_seeds) for pair in combinations(others, 2)]
    with_reference = [d for pairs in compared for _, d in pairs]
    adjusted = iter(holm([d.p for d in (*with_reference, *among_others) if d]))
    return [{row.title: Verdict(d, next(adjusted)) if d else Verdict(None) for row, d in pairs} for pairs in compared]
