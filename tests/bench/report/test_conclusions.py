"""The three sentences of the report are counts and figures of its records."""

from types import SimpleNamespace

from bench.experiments.registry import EXPERIMENTS
from bench.report import conclusions
from bench.report.scores.document import Leaderboard
from bench.report.verdicts import EXCLUDED, FAILS, HOLDS, NOT_RUN, NOT_TESTABLE, UNDECIDED, Claim
from tests.bench.report.speed.speed_records import make_speed, records


def claims(*verdicts):
    return [Claim("A < B", "Table 2", "+1", "+2", verdict) for verdict in verdicts]


class Mean(float):
    """A mean of one seed."""

    @property
    def value(self):
        return float(self)

    def __str__(self):
        return f"{float(self):.1f} ± 0.5"


def published(profile, name, **cells):
    """Return a leaderboard: by method its mean and the text of its last cell."""
    lines = [
        (SimpleNamespace(title=title, records=[1], mean=Mean(mean)), [title, verdict])
        for title, (mean, verdict) in cells.items()
    ]
    theirs = (None, ["*LoRA, the paper's*", ""])
    return profile, EXPERIMENTS[name], ["# a heading", Leaderboard(["method", "against"], [*lines, theirs], "")]


def test_claims_are_counted_by_verdict():
    verdicts = (HOLDS, f"{HOLDS}, on these items (one seed)", FAILS, UNDECIDED, UNDECIDED, NOT_RUN)
    sentence = "Of the paper's 6 claims that we test, 2 hold, 1 fails, 2 are undecided and 1 is not run."
    assert conclusions.claims_sentence(claims(*verdicts)) == sentence
    others = conclusions.claims_sentence(claims(EXCLUDED, NOT_TESTABLE))
    assert others == "Of the paper's 2 claims that we test, 1 excludes the paper's figure and 1 is not testable."
    assert conclusions.claims_sentence(claims(HOLDS)) == "Of the paper's one claim that we test, 1 holds."
    assert "yet" in conclusions.claims_sentence([])


def test_scores_are_those_of_table_2_on_the_largest_profile():
    tiny = published("tiny", "table2", LoRA=(90.0, "best"))
    other = published("small", "table1", LoRA=(95.0, "best"))
    small = published("small", "table2", LoRA=(50.0, "best"), MALoRA=(49.0, "worse: -1.0"), Base=(99.0, ""))
    best = "In Table 2 on the small profile LoRA has the highest mean, 50.0 ± 0.5; "
    assert conclusions.scores_sentence([tiny, other, small]) == best + "MALoRA has 49.0 ± 0.5 (worse: -1.0)."
    first = published("small", "table2", LoRA=(50.0, "not distinguishable: -1.0"), MALoRA=(51.0, "best"))
    expected = "In Table 2 on the small profile MALoRA has the highest mean, 51.0 ± 0.5."
    assert conclusions.scores_sentence([first]) == expected
    assert conclusions.scores_sentence([other]) == "No method of Table 2 has been scored yet."


def test_speed_is_the_worst_of_a_device_and_the_goals_are_counted():
    sentence = "At the 7B shape a training step of MALoRA takes 1.06 (a CPU) times as long as one of the compiled "
    sentence += "frozen backbone; "
    assert conclusions.speed_sentence(records()) == sentence + "10 of 11 goals for speed are reached."
    assert conclusions.speed_sentence([make_speed()]) == sentence + "8 of 9 goals for speed are reached."
    assert "not been measured" in conclusions.speed_sentence([])
