"""The generated pages of `results/` and the generated parts of the README."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bench.experiments.registry import EXPERIMENTS, Experiment
from bench.records.schema import Record, SpeedRecord
from bench.report.claims import claims, claims_table
from bench.report.scores.document import Section, render_page
from bench.report.scores.experiment_page import experiment_parts
from bench.report.scores.leaderboard import leaderboard
from bench.report.scores.selection import (
    select_comparable,
    tuned_rates,
)


def published_pages(records: dict[str, list[Record]]) -> dict[str, str]:
    """The generated files of `results/`, by path in it, from the published records of each profile."""
    return {f"{profile}/{e.name}.md": render_page(parts) for profile, e, parts in published_parts(records)}


def published_parts(records: dict[str, list[Record]]) -> Iterator[tuple[str, Experiment, list[Section]]]:
    """The same by profile and experiment, in parts."""
    for profile, mine in records.items():
        for experiment in EXPERIMENTS.values():
            tuned, rates_from = tuned_rates(experiment, mine)
            found = [r for r in select_comparable(mine, experiment)[0] if r.inside or not experiment.figure]
            # Tables share runs, so one row may be there because another table has it: that is no table yet.
            there = [e for e in experiment.entries if any(experiment.has(e, r.config) for r in found)]
            if experiment.both_rates or len(there) > 1:
                yield profile, experiment, experiment_parts(experiment, mine, profile, tuned, rates_from=rates_from)


def fill_readme(readme: str, records: dict[str, list[Record]], speeds: list[SpeedRecord] = ()) -> str:
    """The README with each part between `<!-- NAME PROFILE -->` or `<!-- claims -->` and `<!-- end -->` made anew."""

    def table(match: re.Match) -> str:
        experiment, profile = EXPERIMENTS[match["experiment"]], match["profile"]
        mine, _ = select_comparable(records.get(profile, []), experiment)
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
