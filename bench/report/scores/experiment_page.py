"""The Markdown page of one experiment and profile.

The same records give the same bytes. Every number comes from a record, or from `paper.json` and is marked as the
paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from bench.experiments.methods import title_of
from bench.records.schema import Record
from bench.records.scorer_versions import changes_since
from bench.report.markdown import code, text
from bench.report.scores import adapter_tables
from bench.report.scores.document import AdapterSection, Section, render_page
from bench.report.scores.leaderboard import leaderboard
from bench.report.scores.reproduction import reproduction
from bench.report.scores.run_tables import options_table, router_table, sweep_table
from bench.report.scores.selection import Selection, groups_with_runs, mixture_rows, spread
from tasks import MIXTURES, TASKS


def experiment_page(selection: Selection, *, swept: bool = True, published: pd.DataFrame | None = None) -> str:
    """Return the page of one experiment and profile; see `experiment_sections`."""
    return render_page(experiment_sections(selection, swept=swept, published=published))


def experiment_sections(
    selection: Selection, *, swept: bool = True, published: pd.DataFrame | None = None
) -> list[Section]:
    """Return the sections of a page in their order.

    Args:
        selection: The records and their learning rates.
        swept: Whether these records contain the sweep that chose the rates.
        published: The published records to compare with, for the page of a reproduction.
    """
    experiment = selection.experiment
    title = f"# {experiment.title}, profile {selection.profile}"
    if selection.frame.empty:
        return [title, "No complete run is recorded yet."]
    sections: list[Section] = [title, _intro(selection)]
    sections += _sections_at_both_rates(selection, swept) if experiment.both_rates else _sections(selection, swept)
    if published is not None and not experiment.figure:
        sections += ["## Against the published records", reproduction(selection, published)]
    return sections


def _sections(selection: Selection, swept: bool) -> list[Section]:
    """Return the sections of a table or figure whose rows have their own rate."""
    sections: list[Section] = [_policy(selection)]
    if selection.experiment.figure:
        found = selection.rows(selection.at_own_rate)
        return [*sections, AdapterSection(adapter_tables.section(selection.experiment, found), found)]
    sections.append(leaderboard(selection, selection.at_own_rate))
    if swept and selection.rates.tuned and selection.rates.source == selection.experiment:
        sections += ["## Scores by learning rate", sweep_table(selection)]
    return sections


def _sections_at_both_rates(selection: Selection, swept: bool) -> list[Section]:
    """Return the sections of a table with each method at two rates.

    The rates are the method's own and the paper's.
    """
    tuned, sections = selection.rates.tuned, list[Section]()
    if tuned:
        chosen = "" if swept else " by the published sweep"
        sections += [
            f"## Each method at its own rate, chosen on validation{chosen}",
            leaderboard(selection, tuned, mark_partial_sweeps=swept),
        ]
    sections += [
        f"## Every method at the paper's rate, {selection.size.paper_rate:g}",
        leaderboard(selection, selection.at_paper_rate),
    ]
    if tuned and swept and selection.rates.source == selection.experiment:
        sections += ["## Scores by learning rate", sweep_table(selection)]
    if routers := router_table(selection):
        sections += ["## Router statistics", routers]
    if variations := options_table(selection, spread(mixture_rows(selection, tuned))):
        sections += ["## Effect of single options", variations]
    return sections


def _policy(selection: Selection) -> str:
    """Say which learning rates the rows have, and their origin.

    The text also says how the ranks differ from the paper's.
    """
    groups, tuned = groups_with_runs(selection.experiment, selection.frame), selection.rates.tuned
    rates = ", ".join(f"{title_of(group)} {selection.at_own_rate[group]:g}" for group in groups)
    lines = [
        "Every row has the learning rate of the method that it is a variant of. It was chosen on validation by "
        f"{_origin(selection)}, which tried the same rates for all: {rates}."
    ]
    if untuned := [title_of(group) for group in groups if group not in tuned]:
        lines.append(f"**Not tuned, at the paper's rate: {', '.join(untuned)}.**")
    if (divisor := selection.size.rank_divisor) > 1:
        lines.append(f"Ranks are those of the titles divided by {divisor}, for a smaller model.")
    return " ".join(lines)


def _origin(selection: Selection) -> str:
    """Name the sweeps that chose the rates.

    Their prompt format is added if it is another one.
    """
    rates = selection.rates
    if rates.source == selection.experiment:
        return "sweeps on this mixture"
    others = sorted(rates.formats - {selection.records[0].config.format})
    return f"the sweeps of {rates.source.title}" + "".join(f", format `{other}`" for other in others)


def _intro(selection: Selection) -> str:
    """Describe the base model, data, machine and the records that are left out."""
    records = selection.records
    config = records[0].config
    devices = sorted({record.provenance.device for record in records})
    lines = [
        f"Base {code(config.model)} (`{config.model_hash[:12]}`), mixture {code(config.mixture)}, "
        f"format {code(config.format)}, "
        f"{config.epochs} epochs, {config.batch_size} examples per batch, on {', '.join(map(text, devices))}. "
        f"Scores are {_metrics(records)} in percent by lm-eval. {len(records)} records."
    ]
    if note := MIXTURES[config.mixture].note:
        lines.append(f"**{note}**")
    lines += [*_data_lines(records), *_older_scorers(records)]
    if not records[0].complete:
        lines.append("**These runs were cut short** (`--max-steps`, `--max-items`): they measure nothing.")
    if selection.left_out:
        lines.append(f"{selection.left_out} records of other settings in this folder are not in these tables.")
    return "\n\n".join(lines)


def _data_lines(records: Sequence[Record]) -> list[str]:
    """Return sentences on the training data and on the examples that were left out."""
    lines = []
    if train := next((r.data.train for r in records if r.data and r.data.train), None):
        counts = (f"{n.examples:,} of {TASKS[t].title} ({n.label_tokens:,})" for t, n in sorted(train.items()))
        lines.append(f"Training examples per epoch, and their label tokens: {', '.join(counts)}.")
    if dropped := _counts(records[0].data.dropped if records[0].data else {}):
        lines.append(f"Left out of training, because a validation or test set has them: {dropped}.")
    by_validation = [(r, r.data.dropped_validation) for r in records if r.data]
    cleaned = [dropped for _, dropped in by_validation if dropped is not None]
    if cleaned and (dropped := _counts(cleaned[0])):
        lines.append(f"Left out of validation, because a test set has them: {dropped}.")
    if older := [record for record, dropped in by_validation if dropped is None]:
        lines.append(f"{_of_methods(older)}: those questions were still in the validation sets.")
    return lines


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{n} of {TASKS[task].title}" for task, n in sorted(dropped.items()) if n)


def _older_scorers(records: Sequence[Record]) -> list[str]:
    """Return a sentence per change of the scorer since scores of these records were made."""
    concerned: dict[str, list[tuple[str, str]]] = {}  # id of the record and title of the task, by change
    for record in records:
        for task, score in (record.test or {}).items():
            for change in changes_since(task, score.metric, score.version):
                concerned.setdefault(change, []).append((record.id, TASKS[task].title))
    return [
        f"**Scored by an older version**: {len({of for of, _ in scores})} of {len(records)} records. Their scores of "
        f"{', '.join(sorted({title for _, title in scores}))} cannot be compared with scores made since: {change}."
        for change, scores in concerned.items()
    ]


def _metrics(records: Sequence[Record]) -> str:
    """Name the scores: accuracy of a choice, and other metrics by task."""
    metrics = {task: score.metric for record in records for task, score in (record.test or {}).items()}
    others = [f"{m} of {TASKS[t].title}" for t, m in sorted(metrics.items()) if m not in ("acc", "acc_norm")]
    return ", ".join(["accuracy", *others])


def _of_methods(records: Sequence[Record]) -> str:
    titles = sorted({title_of(r.config.method) for r in records})
    return f"{len(records)} records, of {' and '.join(titles)}"
