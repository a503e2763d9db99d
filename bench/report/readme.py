"""The generated pages of `results/` and the generated blocks of the README."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.errors import UserError
from bench.experiments.registry import EXPERIMENTS, Experiment
from bench.records.schema import Record
from bench.records.speed_schema import SpeedRecord
from bench.report.claim_pages import claim_files, front_page_claims
from bench.report.markdown import without_comments
from bench.report.scores.document import Section, render_page
from bench.report.scores.experiment_page import experiment_sections
from bench.report.scores.leaderboard import short_leaderboard
from bench.report.scores.selection import Selection, records_frame, runs_of, select
from bench.report.speed.goals import front_page_goals
from bench.report.speed.loop_goals import front_page_loop_goals
from bench.report.verdicts import Claim

MARKER = re.compile(r"<!-- ([\w ]+) -->")
END = "end"
# The last line of the README. Without it the file was cut off, by an editor or a full disk.
LAST_LINE = "<!-- end of the README -->"


def published_pages(records: Mapping[str, Sequence[Record]], claims: Sequence[Claim]) -> dict[str, str]:
    """Return the generated pages by their path in `results/`.

    They are made from the published records of each profile.
    """
    pages = {f"{profile}/{e.name}.md": render_page(sections) for profile, e, sections in published_sections(records)}
    return pages | claim_files(claims)


def published_sections(
    records: Mapping[str, Sequence[Record]],
) -> Iterator[tuple[str, Experiment, list[Section]]]:
    """Yield the profile, the experiment and the sections of every page of scores."""
    for selection in published_selections(records):
        yield selection.profile, selection.experiment, experiment_sections(selection)


def published_selections(records: Mapping[str, Sequence[Record]]) -> Iterator[Selection]:
    """Yield the records of every page of scores."""
    for profile, mine in records.items():
        frame = records_frame(mine)
        for experiment in EXPERIMENTS.values():
            selection = select(experiment, profile, frame)
            if _is_table(selection):
                yield selection


def _is_table(selection: Selection) -> bool:
    """Return whether an experiment has enough rows for a page.

    Experiments share runs, so a single row may be there because another experiment has it.
    """
    experiment, frame = selection.experiment, selection.frame
    if experiment.both_rates:
        return True
    if experiment.figure:
        frame = frame[[record.inside is not None for record in frame["record"]]] if len(frame) else frame
    return sum(len(runs_of(frame, experiment, entry)) > 0 for entry in experiment.entries) > 1


def fill_readme(
    readme: str, records: Mapping[str, Sequence[Record]], speeds: Sequence[SpeedRecord], claims: Sequence[Claim]
) -> str:
    """Return the README with a new text in each block.

    A block lies between a marker and `<!-- end -->`. The markers are `<!-- claims -->`, `<!-- speed -->`,
    `<!-- training loops -->` and `<!-- EXPERIMENT PROFILE -->`. Other comments stay.

    Raises:
        UserError: a marker has no end, or an end has no marker.
    """
    filled, position = [], 0
    while start := MARKER.search(readme, position):
        filled.append(readme[position : start.end()])
        position = start.end()
        if start[1] == END:
            raise UserError(f"the README has a <!-- {END} --> without a marker before it; restore the marker.")
        text = _block(start[1], records, speeds, claims)
        if text is None:
            continue
        end = MARKER.search(readme, position)
        if end is None or end[1] != END:
            raise UserError(f"the README's {start[0]} has no <!-- {END} --> after it; add one.")
        filled.append(f"\n\n{without_comments(text)}\n\n{end[0]}")
        position = end.end()
    return "".join([*filled, readme[position:]])


def read_readme(path: Path) -> str:
    """Return the text of the README.

    Raises:
        UserError: It is missing, not UTF-8, or incomplete.
    """
    restore = "restore it (git checkout README.md)"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {restore}.") from error
    if not text.endswith(f"{LAST_LINE}\n"):
        raise UserError(f"{path} is incomplete: its last line is not {LAST_LINE}; {restore}.")
    return text


def _block(
    name: str, records: Mapping[str, Sequence[Record]], speeds: Sequence[SpeedRecord], claims: Sequence[Claim]
) -> str | None:
    """Return the text of a block, or None if its name is not one of a block."""
    if name == "claims":
        return front_page_claims(claims)
    if name == "speed":
        return front_page_goals(list(speeds))
    if name == "training loops":
        return front_page_loop_goals(list(speeds))
    experiment, _, profile = name.partition(" ")
    if experiment not in EXPERIMENTS:
        return None
    frame = records_frame(records.get(profile, []))
    if frame.empty:
        return "No run is published yet."
    return short_leaderboard(select(EXPERIMENTS[experiment], profile, frame), f"results/{profile}/{experiment}.md")
