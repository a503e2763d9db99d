"""Records to Markdown. Pure: the same records give the same bytes, and no number comes from anywhere else.

The paper's own figures are those of `paper.json`, and are marked as the paper's wherever they stand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from bench import inside_report
from bench.claims import claims, claims_table
from bench.experiments import EXPERIMENTS, SWEEP_SEED, TITLES, Entry, Experiment
from bench.paper import paper
from bench.parts import Board, Insides, Part, page_of
from bench.profiles import PROFILES
from bench.record import Record, RunConfig, SpeedRecord
from bench.rows import Row, comparable, difference, entries_of, families_that_ran, rows, spread, tuned_rates
from bench.run import BASE
from bench.runs_report import options_table, router_table, sweep_table
from bench.stats import LEVEL, POWER, holm
from tasks import MIXTURES, TASKS


def experiment_page(*arguments, **options) -> str:
    """The page of one experiment and profile; see `experiment_parts`."""
    return page_of(experiment_parts(*arguments, **options))


def experiment_parts(
    experiment: Experiment,
    records: list[Record],
    profile: str,
    tuned: dict[str, float],
    *,
    like: RunConfig | None = None,
    swept: bool = True,
    published: list[Record] | None = None,
    lender: Experiment | None = None,
) -> list[Part]:
    """What the page of one experiment and profile has, in its order.

    Args:
        tuned: each family's own rate.
        like: a configuration that the page's records agree with; see `comparable`.
        swept: whether these records hold the sweep that chose the rates, or only its choice.
        published: records to compare with, for the page of a reproduction.
        lender: the experiment whose sweep chose the rates; None for this one.
    """
    mine, others = comparable(records, experiment, like)
    if not mine:
        return [f"# {experiment.title}, profile {profile}", "No whole run is recorded yet."]
    some = mine[0].config
    lender = None if lender == experiment else lender
    size = PROFILES[profile].on(experiment.mixture)
    entries = entries_of(experiment, mine)
    at_paper = dict.fromkeys((entry.family for entry in entries), size.paper_rate)
    parts = [f"# {experiment.title}, profile {profile}", _intro(mine, some, others)]
    if not experiment.both_rates:
        chose = _chooser(lender, published or records, some.format)
        parts.append(_policy(families_that_ran(experiment, mine), tuned, at_paper, size.rank_divisor, chose))
        if experiment.figure:
            found = rows(mine, entries, at_paper | tuned, experiment)
            parts.append(Insides(inside_report.section(experiment, found), found))
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
    if tuned and swept and lender is None and not experiment.figure:
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


def _chooser(lender: Experiment | None, records: list[Record], format: str) -> str:
    """What chose the rates of rows whose questions are put in this format."""
    if lender is None:
        return "sweeps on this mixture"
    others = {r.config.format for r in comparable(records, lender)[0]} - {format}
    return f"the sweeps of {lender.title}" + "".join(f", format `{other}`" for other in sorted(others))


def _policy(
    families: list[str], tuned: dict[str, float], paper_rate: dict[str, float], divisor: int, chose: str
) -> str:
    """Which rates the rows have and what chose them, and what else is not the paper's."""
    rates = ", ".join(f"{TITLES.get(f, f)} {(paper_rate | tuned)[f]:g}" for f in families)
    lines = [
        f"A row takes the rate of the method that it is a variant of, chosen on validation by {chose}, all at the same "
        f"rates: {rates}."
    ]
    if untuned := [TITLES.get(f, f) for f in families if f not in tuned]:
        lines.append(f"**Not tuned, at the paper's rate: {', '.join(untuned)}.**")
    if divisor > 1:
        lines.append(f"Ranks are those of the titles divided by {divisor}, for a smaller model.")
    return " ".join(lines)


def _intro(records: list[Record], config: RunConfig, others: int) -> str:
    devices = sorted({r.provenance["device"] for r in records})
    lines = [
        f"Base `{config.model}` (`{config.model_hash[:12]}`), mixture `{config.mixture}`, format `{config.format}`, "
        f"{config.epochs} epochs, {config.batch_size} examples a batch, on {', '.join(devices)}. "
        f"Scores are {_metrics(records)} in percent by lm-eval. {len(records)} records."
    ]
    if note := MIXTURES[config.mixture].note:
        lines.append(f"**{note}**")
    train = next((r.data["train"] for r in records if r.data and r.data.get("train")), {})
    if train:
        parts = (f"{n['examples']:,} of {TASKS[t].title} ({n['label_tokens']:,})" for t, n in sorted(train.items()))
        lines.append(f"Training examples an epoch, and their label tokens: {', '.join(parts)}.")
    dropped = {t: n for t, n in sorted((records[0].data or {}).get("dropped", {}).items()) if n}
    if dropped:
        parts = (f"{n} of {TASKS[t].title}" for t, n in dropped.items())
        lines.append(f"Left out of training, because they stand in a validation or test set: {', '.join(parts)}.")
    cleaned = [r for r in records if r.data and r.data.get("dropped_validation") is not None]
    if cleaned and any(cleaned[0].data["dropped_validation"].values()):
        parts = (f"{n} of {TASKS[t].title}" for t, n in sorted(cleaned[0].data["dropped_validation"].items()) if n)
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
    metrics = {task: score["metric"] for r in records for task, score in (r.test or {}).items()}
    others = [f"{m} of {TASKS[t].title}" for t, m in sorted(metrics.items()) if m not in ("acc", "acc_norm")]
    return ", ".join(["accuracy", *others])


def _scorer(record: Record) -> int | None:
    """The scorer's version."""
    return next((score["version"] for score in (record.test or {}).values()), None)


def _of_methods(records: list[Record]) -> str:
    titles = sorted({TITLES.get(r.config.method, r.config.method) for r in records})
    return f"{len(records)} records, of {' and '.join(titles)}"


def leaderboard(
    experiment: Experiment, records: list[Record], rates: dict[str, float], mark_partial_sweeps: bool = False
) -> Board:
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
    for row in [*rows(records, [Entry(BASE)], {BASE: None}, experiment), *found]:
        if not row.records:
            lines.append(
                (row, [row.title, "" if row.rate is None else f"{row.rate:g}", *[""] * (len(tasks) + 3), _broken(row)])
            )
            continue
        parameters = row.records[0].parameters
        lines.append((row, [
            row.title, "" if row.rate is None else f"{row.rate:g}",
            f"{parameters['trainable']:,}" if parameters else "",
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
    return Board(head, lines, " ".join(notes))


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


def _broken(row: Row) -> str:
    counts = Counter(record.status for record in row.broken)
    return ", ".join(f"{n} of {n + len(row.records)} runs {status}" for status, n in sorted(counts.items()))


def _verdicts(scored: list[Row], best: Row | None, name: str, detailed: bool) -> dict[str, str]:
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


def reproduction(experiment: Experiment, mine: list[Record], published: list[Record], profile: str) -> str:
    """One line a method and rate: whether this machine's mean is where another run of the published one would fall."""
    theirs, _ = comparable(published, experiment)
    if not theirs:
        return "Nothing is published for this profile yet."
    entries = entries_of(experiment, theirs)
    own, _ = tuned_rates(experiment, published)
    at_paper = dict.fromkeys((entry.family for entry in entries), PROFILES[profile].on(experiment.mixture).paper_rate)
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


def published_pages(records: dict[str, list[Record]]) -> dict[str, str]:
    """The generated files of `results/`, by path in it, from the published records of each profile."""
    return {f"{profile}/{e.name}.md": page_of(parts) for profile, e, parts in published_parts(records)}


def published_parts(records: dict[str, list[Record]]) -> Iterator[tuple[str, Experiment, list[Part]]]:
    """The same by profile and experiment, in parts."""
    for profile, mine in records.items():
        for experiment in EXPERIMENTS.values():
            tuned, lender = tuned_rates(experiment, mine)
            found = [r for r in comparable(mine, experiment)[0] if r.inside or not experiment.figure]
            # Tables share runs, so one row may be there because another table has it: that is no table yet.
            there = [e for e in experiment.entries if any(experiment.has(e, r.config) for r in found)]
            if experiment.both_rates or len(there) > 1:
                yield profile, experiment, experiment_parts(experiment, mine, profile, tuned, lender=lender)


def fill_readme(readme: str, records: dict[str, list[Record]], speeds: list[SpeedRecord] = ()) -> str:
    """The README with each part between `<!-- NAME PROFILE -->` or `<!-- claims -->` and `<!-- end -->` made anew."""

    def table(match: re.Match) -> str:
        experiment, profile = EXPERIMENTS[match["experiment"]], match["profile"]
        mine, _ = comparable(records.get(profile, []), experiment)
        tuned, _ = tuned_rates(experiment, mine)
        text = leaderboard(experiment, mine, tuned, mark_partial_sweeps=True) if mine else "No run is published yet."
        return f"{match['start']}\n\n{text}\n\n<!-- end -->"

    if "<!-- claims -->" in readme:
        before, _, rest = readme.partition("<!-- claims -->")
        table_of_claims = claims_table(claims(records, speeds))
        readme = f"{before}<!-- claims -->\n\n{table_of_claims}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return re.sub(
        r"(?P<start><!-- (?P<experiment>\w+) (?P<profile>\w+) -->).*?<!-- end -->", table, readme, flags=re.DOTALL
    )
