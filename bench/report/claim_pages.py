"""Markdown of claims: a table of all, a page per claim, and the few on the README."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.claims import NOTES
from bench.report.markdown import inline, table
from bench.report.verdicts import Claim, Evidence

# The most important ones. The list is fixed; it does not depend on the results.
FRONT_PAGE = (
    "malora-over-molora-inter",
    "malora-over-molora-intra",
    "malora-over-lora-intra",
    "similarity-multi-task",
    "parameters-fewer-than-molora-r12",
)
INDEX = "claims.md"
_INTERVAL = ", with its 95% interval"


def claim_files(found: Sequence[Claim]) -> dict[str, str]:
    """Return the pages of the claims by their path in `results/`."""
    return {INDEX: _index(found)} | {_path(claim): claim_page(claim) for claim in found}


def _path(claim: Claim) -> str:
    return f"claims/{claim.key}.md"


def _index(found: Sequence[Claim]) -> str:
    body = [[*_cells(claim), f"[details]({_path(claim)})"] for claim in found]
    head = ["the paper's claim", "source", "the paper's", "ours", "p", "verdict", ""]
    return f"# The paper's claims and our records\n\n{table(body, head)}\n\n{NOTES}\n"


def _cells(claim: Claim) -> list[str]:
    p = "" if claim.p is None else f"{claim.p:.2g}"
    return [claim.claim, claim.source, claim.paper, claim.ours, p, f"**{claim.verdict}**"]


def front_page_claims(found: Sequence[Claim]) -> str:
    """Return the README's table of the most important claims."""
    by_key = {claim.key: claim for claim in found}
    chosen = [by_key[key] for key in FRONT_PAGE]
    body = [[c.claim, c.paper, c.ours, f"**{c.verdict}**"] for c in chosen]
    return (
        f"{table(body, ['claim', 'the paper', 'ours', 'verdict'])}\n\n"
        f"[All {len(found)} claims, with tests and records](results/{INDEX})."
    )


def claim_page(claim: Claim) -> str:
    """Return the page of a claim: its test, its values, the interval and the records."""
    facts = f"The paper ({claim.source}): {claim.paper}."
    first = claim.claim[0]
    title = f"# {first.upper() if first.isascii() else first}{claim.claim[1:]}"
    if claim.evidence is None:
        parts = [title, f"{facts} Verdict: **{claim.verdict}**. No complete record tests this yet."]
        return "\n\n".join(parts) + "\n"
    evidence = claim.evidence
    parts = [
        title,
        f"{facts} Ours{_INTERVAL if '[' in claim.ours else ''}: {claim.ours}. Verdict: **{claim.verdict}**.",
        f"Measured on: {inline(evidence.setting)}.",
        "## Test",
        evidence.test,
    ]
    if claim.p is not None and evidence.p is not None:
        parts.append(f"p = {evidence.p:.2g}, and {claim.p:.2g} with Holm's correction over the {claim.family} claims.")
    if evidence.paper_p is not None:
        parts.append(
            f"That the true difference is the paper's has p = {evidence.paper_p:.2g}, with Holm's correction over the "
            f"{claim.family} claims."
        )
    parts += [f"## By {evidence.unit}", _values(evidence)]
    if claim.records:
        links = (f"- [{id}](../{claim.profile}/runs/{id}.json)" for id in claim.records)
        parts += ["## Records", "\n".join(links)]
    return "\n\n".join([*parts, f"[All claims](../{INDEX})"]) + "\n"


def _values(evidence: Evidence) -> str:
    """Return the values, a line per unit, with their means."""
    columns = evidence.columns
    units = list(dict.fromkeys(unit for values in columns.values() for unit in values))
    body = [[unit, *(_value(values.get(unit)) for values in columns.values())] for unit in units]
    if len(units) > 1 and evidence.p is not None:
        body.append(["mean", *(_value(sum(values.values()) / len(values)) for values in columns.values())])
    return table(body, [evidence.unit, *columns], ["left", *["right"] * len(columns)])


def _value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"
