"""Claims with their evidence, and the rule that turns tests into verdicts.

Claims of one kind are one family: scores, similarity of experts, or speed. Holm's correction is over the tests of a
family, which is fixed by the kind of what is measured and not by the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bench.report.stats import LEVEL, holm

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "fails", "undecided", "not run"
EXCLUDED, NOT_TESTABLE = "the paper's figure is excluded", "not testable"

Family = Literal["score", "similarity", "speed"]


@dataclass(frozen=True)
class Evidence:
    """The measurements behind a claim, for its page.

    Attributes:
        setting: What was measured: profile and mixture, or shape and device.
        test: How the verdict follows, in sentences.
        unit: What a value belongs to: seed, run or round.
        columns: Values by column and unit.
        p: Before Holm's correction; None if nothing was tested.
        paper_p: p of the true difference being the paper's, with Holm's correction; None if that was not tested.
    """

    setting: str
    test: str
    unit: str
    columns: dict[str, dict[str, float]]
    p: float | None = None
    paper_p: float | None = None


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and its verdict.

    Attributes:
        claim: What the paper says.
        source: Where it says so.
        paper: The paper's figure.
        ours: Our figure with a 95% interval.
        verdict: holds, fails, the paper's figure is excluded, undecided, not testable or not run; after a comma, its
            limits.
        records: Ids of the records that it rests on.
        profile: Folder of those records; "speed" for those of `bench.speed`.
        key: Name of the claim's page.
        p: With Holm's correction over the family; None if nothing was tested.
        family: Kind of the claim, if it was tested.
        evidence: None if it was not run.
    """

    claim: str
    source: str
    paper: str
    ours: str = ""
    verdict: str = NOT_RUN
    records: list[str] = field(default_factory=list)
    profile: str | None = None
    key: str = ""
    p: float | None = None
    family: Family | None = None
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Unjudged:
    """A claim before its verdict, which depends on the p-values of the others.

    Attributes:
        above: Whether the figure is above the bound.
        p: Two-sided, of being at the bound.
        family: Kind of the claim.
        limit: What the verdict is limited to.
        paper_p: Two-sided, of the true difference being the paper's; None if the paper states no such figure.
    """

    claim: Claim
    above: bool
    p: float
    family: Family
    limit: str = ""
    paper_p: float | None = None


def judge(found: Sequence[Claim | Unjudged]) -> list[Claim]:
    """Return the claims with their verdicts, in the order given.

    A test decides if its p is below 5% after Holm's correction over its family. If it does not decide, the paper's
    figure may still be excluded, by the same level and a correction over the family's figures.
    """
    corrected: dict[int, float] = {}
    of_paper: dict[int, float] = {}
    for family in {one.family for one in found if isinstance(one, Unjudged)}:
        members = [(i, one) for i, one in enumerate(found) if isinstance(one, Unjudged) and one.family == family]
        corrected |= zip((i for i, _ in members), holm([one.p for _, one in members]), strict=True)
        figures = [(i, one.paper_p) for i, one in members if one.paper_p is not None]
        of_paper |= zip((i for i, _ in figures), holm([p for _, p in figures]), strict=True)
    return [
        _judge(one, corrected[i], of_paper.get(i)) if isinstance(one, Unjudged) else one for i, one in enumerate(found)
    ]


def _judge(tested: Unjudged, p: float, paper_p: float | None) -> Claim:
    verdict = UNDECIDED
    if p < 1 - LEVEL:
        verdict = HOLDS if tested.above else FAILS
    elif paper_p is not None and paper_p < 1 - LEVEL:
        verdict = EXCLUDED
    if tested.limit and verdict != UNDECIDED:
        verdict = f"{verdict}, {tested.limit}"
    evidence = tested.claim.evidence and replace(tested.claim.evidence, p=tested.p, paper_p=paper_p)
    return replace(tested.claim, verdict=verdict, p=p, family=tested.family, evidence=evidence)
