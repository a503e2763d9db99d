"""Records to Markdown. Pure: the same records give the same bytes, and no number comes from anywhere else.

The paper's own figures are those of `paper.json`, and are marked as the paper's wherever they stand.
"""

from __future__ import annotations

from bench.experiments.methods import TITLES
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import Experiment
from bench.records.schema import Record, RunConfig
from bench.report.scores import adapter_tables
from bench.report.scores.document import AdapterSection, Section, render_page
from bench.report.scores.leaderboard import leaderboard
from bench.report.scores.reproduction import reproduction
from bench.report.scores.run_tables import options_table, router_table, sweep_table
from bench.report.scores.selection import (
    entries_of,
    groups_with_runs,
    rows,
    select_comparable,
    spread,
)
from tasks import MIXTURES, TASKS


def experiment_page(*arguments, **options) -> str:
    """The page of one experiment and profile; see `experiment_parts`."""
    return render_page(experiment_parts(*arguments, **options))


def experiment_parts(
    experiment: Experiment,
    records: list[Record],
    profile: str,
    tuned: dict[str, float],
    *,
    like: RunConfig | None = None,
    swept: bool = True,
    published: list[Record] | None = None,
    rates_from: Experiment | None = None,
) -> list[Section]:
    """What the page of one experiment and profile has, in its order.

    Args:
        tuned: each family's own rate.
        like: a configuration that the page's records agree with; see `comparable`.
        swept: whether these records hold the sweep that chose the rates, or only its choice.
        published: records to compare with, for the page of a reproduction.
        lender: the experiment whose sweep chose the rates; None for this one.
    """
    mine, others = select_comparable(records, experiment, like)
    if not mine:
        return [f"# {experiment.title}, profile {profile}", "No whole run is recorded yet."]
    some = mine[0].config
    rates_from = None if rates_from == experiment else rates_from
    size = PROFILES[profile].on(experiment.mixture)
    entries = entries_of(experiment, mine)
    at_paper = dict.fromkeys((entry.tuning_group for entry in entries), size.paper_rate)
    parts = [f"# {experiment.title}, profile {profile}", _intro(mine, some, others)]
    if not experiment.both_rates:
        chose = _chooser(rates_from, published or records, some.format)
        parts.append(_policy(groups_with_runs(experiment, mine), tuned, at_paper, size.rank_divisor, chose))
        if experiment.figure:
            found = rows(mine, entries, at_paper | tuned, experiment)
            parts.append(AdapterSection(adapter_tables.section(experiment, found), found))
        else:
            parts.append(leaderboard(experiment, mine, at_paper | tuned))
    elif tuned:
        parts += [
            f"## Each method at its own rate, chosen on validation{'' if swept else ' by the published sweep'}",
            leaderboard(experiment, mine, tuned, mark_partial_sweeps=swept),
        ]
    if experiment.both_rates:
        parts += [f"## Every method at the paper's rate, {size.paper_rate:g}",
                  leaderboard(experiment, mine, at_paper)]  # fmt: skip
    if tuned and swept and rates_from is None and not experiment.figure:
        parts += ["## What each rate gave", sweep_table(experiment, mine, tuned)]
    if experiment.both_rates and (routers := router_table(experiment, mine)):
        parts += ["## What the routers did", routers]
    if experiment.both_rates and (
        variations := options_table(records, mine, spread(rows(mine, experiment.entries, tuned, experiment)))
    ):
        parts += ["## What an option changes", variations]
    if published is not None and not experiment.figure:
        parts += ["## Against the published records", reproduction(experiment, mine, published, profile)]
    return parts


def _chooser(rates_from: Experiment | None, records: list[Record], format: str) -> str:
    """What chose the rates of rows whose questions are put in this format."""
    if rates_from is None:
        return "sweeps on this mixture"
    others = {r.config.format for r in select_comparable(records, rates_from)[0]} - {format}
    return f"the sweeps of {rates_from.title}" + "".join(f", format `{other}`" for other in sorted(others))


def _policy(
    tuning_groups: list[str], tuned: dict[str, float], paper_rate: dict[str, float], divisor: int, chose: str
) -> str:
    """Which rates the rows have and what chose them, and what else is not the paper's."""
    rates = ", ".join(f"{TITLES.get(f, f)} {(paper_rate | tuned)[f]:g}" for f in tuning_groups)
    lines = [
        f"A row takes the rate of the method that it is a variant of, chosen on validation by {chose}, all at the same "
        f"rates: {rates}."
    ]
    if untuned := [TITLES.get(f, f) for f in tuning_groups if f not in tuned]:
        lines.append(f"**Not tuned, at the paper's rate: {', '.join(untuned)}.**")
    if divisor > 1:
        lines.append(f"Ranks are those of the titles divided by {divisor}, for a smaller model.")
    return " ".join(lines)


def _intro(records: list[Record], config: RunConfig, others: int) -> str:
    devices = sorted({r.provenance.device for r in records})
    lines = [
        f"Base `{config.model}` (`{config.model_hash[:12]}`), mixture `{config.mixture}`, format `{config.format}`, "
        f"{config.epochs} epochs, {config.batch_size} examples a batch, on {', '.join(devices)}. "
        f"Scores are {_metrics(records)} in percent by lm-eval. {len(records)} records."
    ]
    if note := MIXTURES[config.mixture].note:
        lines.append(f"**{note}**")
    train = next((r.data.train for r in records if r.data and r.data.train), {})
    if train:
        parts = (f"{n.examples:,} of {TASKS[t].title} ({n.label_tokens:,})" for t, n in sorted(train.items()))
        lines.append(f"Training examples an epoch, and their label tokens: {', '.join(parts)}.")
    dropped = {t: n for t, n in sorted((records[0].data.dropped if records[0].data else {}).items()) if n}
    if dropped:
        parts = (f"{n} of {TASKS[t].title}" for t, n in dropped.items())
        lines.append(f"Left out of training, because they stand in a validation or test set: {', '.join(parts)}.")
    cleaned = [r for r in records if r.data and r.data.dropped_validation is not None]
    if cleaned and any(cleaned[0].data.dropped_validation.values()):
        parts = (f"{n} of {TASKS[t].title}" for t, n in sorted(cleaned[0].data.dropped_validation.items()) if n)
        lines.append(f"Left out of validation, because they stand in a test set: {', '.join(parts)}.")
    if older := [r for r in records if r.data and r not in cleaned]:
        lines.append(f"{_of_methods(older)}: those questions were still in the validation sets.")
    versions = {_scorer(r) for r in records} - {None}
    if older := [r for r in records if _scorer(r) is not None and _scorer(r) != max(versions)]:
        lines.append(f"{_of_methods(older)}: scored by an older version of `bench/score.py`, which says what changed.")
    if not records[0].complete:
        lines.append("**These runs were cut short** (`--max-steps`, `--max-items`): they measure nothing.")
    if others:
        lines.append(f"{others} records of other settings in this folder are not in these tables.")
    return "\n\n".join(lines)


def _metrics(records: list[Record]) -> str:
    """What the scores are, by task where that is not the accuracy of a choice."""
    metrics = {task: score.metric for r in records for task, score in (r.test or {}).items()}
    others = [f"{m} of {TASKS[t].title}" for t, m in sorted(metrics.items()) if m not in ("acc", "acc_norm")]
    return ", ".join(["accuracy", *others])


def _scorer(record: Record) -> int | None:
    """The scorer's version."""
    return next((score.version for score in (record.test or {}).values()), None)


def _of_methods(records: list[Record]) -> str:
    titles = sorted({TITLES.get(r.config.method, r.config.method) for r in records})
    return f"{len(records)} records, of {' and '.join(titles)}"
