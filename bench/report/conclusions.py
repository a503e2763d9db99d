"""Three sentences that say what the records show.

Every number comes from a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from bench.experiments.methods import TITLES
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import EXPERIMENTS, Experiment
from bench.records.speed_schema import SpeedRecord
from bench.report.claims import EVIDENCE
from bench.report.markdown import number
from bench.report.scores.document import Leaderboard, Section
from bench.report.speed.goals import GOALS, count_reached, measured
from bench.report.verdicts import EXCLUDED, FAILS, HOLDS, NOT_RUN, NOT_TESTABLE, UNDECIDED, Claim

# A verdict begins with one of these words; here with its verb after the number 1 and after other numbers.
VERBS = {
    HOLDS: ("holds", "hold"),
    FAILS: ("fails", "fail"),
    EXCLUDED: ("excludes the paper's figure", "exclude the paper's figure"),
    UNDECIDED: ("is undecided", "are undecided"),
    NOT_TESTABLE: ("is not testable", "are not testable"),
    NOT_RUN: ("is not run", "are not run"),
}
SUMMARIZED = EXPERIMENTS["table2"]  # the experiment with all methods, each at its own learning rate


def verdict_word(verdict: str) -> str:
    """Return the words that a verdict begins with, one of the keys of `VERBS`."""
    return next(word for word in VERBS if verdict.startswith(word))


Published = tuple[str, Experiment, list[Section]]  # profile, experiment and the sections of its page


def conclusions(published: Iterable[Published], speeds: list[SpeedRecord], claims: list[Claim]) -> list[str]:
    """Return a sentence each on the paper's claims, the scores and the speed."""
    return [claims_sentence(claims), scores_sentence(published), speed_sentence(speeds)]


def claims_sentence(claims: list[Claim]) -> str:
    """Count the claims by verdict."""
    if not claims:
        return "None of the paper's claims has been compared with records yet."
    counts = Counter(verdict_word(claim.verdict) for claim in claims)
    parts = [f"{counts[word]} {verbs[counts[word] > 1]}" for word, verbs in VERBS.items() if counts[word]]
    tested = f"{len(claims)} claims that we test" if len(claims) > 1 else "one claim that we test"
    return f"Of the paper's {tested}, {_and(parts)}."


def scores_sentence(published: Iterable[Published]) -> str:
    """Compare MALoRA with the best method of Table 2.

    The comparison is on the largest profile that has the table.
    """
    leaderboards = {
        profile: next((section for section in sections if isinstance(section, Leaderboard)), None)
        for profile, experiment, sections in published
        if experiment == SUMMARIZED
    }
    profile = next((name for name in (*EVIDENCE, *PROFILES) if leaderboards.get(name)), None)
    lines = found.lines if profile and (found := leaderboards[profile]) else []
    scored = [(row, cells[-1]) for row, cells in lines if row and row.records and cells[-1]]
    table = SUMMARIZED.title.partition(":")[0]
    if not scored:
        return f"No method of {table} has been scored yet."
    best, _ = max(scored, key=lambda line: line[0].mean.value)
    sentence = f"In {table} on the {profile} profile {best.title} has the highest mean, {best.mean}"
    ours = next(((row, verdict) for row, verdict in scored if row.title == TITLES["malora"]), None)
    if ours is None or ours[0] is best:
        return f"{sentence}."
    return f"{sentence}; MALoRA has {ours[0].mean} ({ours[1]})."


def speed_sentence(speeds: list[SpeedRecord]) -> str:
    """Compare MALoRA's training step with the frozen backbone's by device.

    The sentence also counts the goals that are reached.
    """
    goal = GOALS[0]  # MALoRA's step over the compiled frozen backbone's
    worst = {device: goal.worst_value(values) for device, values in measured(goal, speeds).items() if values}
    if not worst:
        return "Speed on a GPU has not been measured yet."
    ratios = [f"{number(value, 3)} ({device})" for device, value in sorted(worst.items())]
    reached, known = count_reached(speeds)
    return (
        f"At the 7B shape a training step of MALoRA takes {_and(ratios)} times as long as one of the compiled frozen "
        f"backbone; {reached} of {known} goals for speed are reached."
    )


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
