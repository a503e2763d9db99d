"""What the paper claims, and what the records say to it. Pure.

A claim about scores is a paired difference of two rows, tested against a bound: 0 for "better", -MARGIN for "no worse",
because a claim that something does not happen needs a margin within which it would not count. It holds where the
difference is above the bound, and does not hold where it is below, with Holm's correction over all claims that were
tested; otherwise it cannot be told at this size. With one seed how much runs vary is taken from the table's rows that
have several; where none has, a test knows of the items only, and the verdict says so.

The tiny profile is a test of the harness and no evidence about the paper. Of the others the largest that has the runs
counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from peft import get_peft_model
from scipy.stats import ttest_1samp, ttest_ind
from tabulate import tabulate

import malora
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import EXPERIMENTS
from bench.models.backbone import SHAPES, backbone
from bench.records.schema import Record, SpeedRecord
from bench.report.paper import paper
from bench.report.scores.adapter_tables import readings
from bench.report.scores.selection import TableRow, difference, entries_of, rows, select_comparable, spread, tuned_rates
from bench.report.speed.summary import by_round, compared, exact_rows, seconds
from bench.report.stats import LEVEL, Difference, compare, holm

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "cannot be told at this size", "not run"
EVIDENCE = ("paper", "small")  # profiles, the largest first
MARGIN = 1.0  # points; the paper reads differences of this size as real


@dataclass(frozen=True)
class Claim:
    """A row of the table.

    Attributes:
        claim, source: what the paper says, and where.
        paper, ours: figures, the latter with a 95% interval.
        verdict: holds, does not hold, cannot be told at this size or not run; after a comma what it is limited to.
        records: ids of the records that it rests on, of this profile ("speed" for those of `bench.speed`).
    """

    claim: str
    source: str
    paper: str
    ours: str = ""
    verdict: str = NOT_RUN
    records: list[str] = field(default_factory=list)
    profile: str | None = None


@dataclass(frozen=True)
class _Tested:
    """A claim before its verdict, which needs the p-values of the others."""

    claim: Claim
    above: bool  # on the side of the bound where the claim holds
    p: float  # two-sided, of being at the bound
    limited: str = ""


def claims(records_by_profile: dict[str, list[Record]], speeds: list[SpeedRecord]) -> list[Claim]:
    """Every claim that we test, in the paper's order of importance, with its verdict."""
    tables = _Tables(records_by_profile)
    intra, inter = (partial(_better, tables, name) for name in ("table2", "table1"))
    ablations = [entry.title for entry in EXPERIMENTS["table3"].entries if entry.tuning_group == "malora"]
    found = [
        inter("MoLoRA", "MALoRA"),
        intra("MoLoRA", "MALoRA"),
        inter("LoRA", "MALoRA"),
        intra("LoRA", "MALoRA"),
        inter("MoLoRA", "MALoRA-Small", bound=-MARGIN, fewer=True),
        *(
            _better(tables, "table3", title, "MALoRA", what=f"the ablation “{title}” hurts")
            for title in ablations
            if title != "MALoRA"
        ),
        _better(tables, "table11", "MALoRA r=12 d=32 β=1", "MALoRA r=48 d=128 β=5", bound=-MARGIN,
                what="a higher rank does not overfit MALoRA: 48 is no worse than 12"),
        _beta(tables),
        *(_alike(tables, setting) for setting in ("ST(S)", "ST(D)", "MT")),
        *(_fewer_parameters(rank) for rank in (12, 16)),
        *(_faster(speeds, by) for by in ("dispatch", None)),
    ]  # fmt: skip
    adjusted = iter(holm([one.p for one in found if isinstance(one, _Tested)]))
    return [_judged(one, next(adjusted)) if isinstance(one, _Tested) else one for one in found]


def _judged(tested: _Tested, p: float) -> Claim:
    verdict = UNDECIDED
    if p < 1 - LEVEL:
        verdict = (HOLDS if tested.above else FAILS) + tested.limited
    return replace(tested.claim, verdict=verdict, ours=f"{tested.claim.ours}, p={p:.2g}")


class _Tables:
    """Rows by experiment and title, of the largest profile that has what is asked for."""

    def __init__(self, records: dict[str, list[Record]]) -> None:
        self.records = records

    @cache  # noqa: B019  (it lives as long as one call of `claims`)
    def rows(self, name: str, profile: str) -> dict[str, TableRow]:
        experiment = EXPERIMENTS[name]
        mine, _ = select_comparable(self.records.get(profile, []), experiment)
        tuned, _ = tuned_rates(experiment, self.records.get(profile, []))
        entries = entries_of(experiment, mine)
        rate = PROFILES[profile].on(experiment.mixture).paper_rate
        rates = dict.fromkeys((entry.tuning_group for entry in entries), rate) | tuned
        return {row.title: row for row in rows(mine, entries, rates, experiment)}

    def find(self, name: str, titles: list[str]) -> tuple[str, list[TableRow]] | None:
        """The profile and these rows of an experiment, if a profile has scores of all of them."""
        for profile in EVIDENCE:
            found = self.rows(name, profile)
            if all(title in found and found[title].records for title in titles):
                return profile, [found[title] for title in titles]
        return None


def _better(
    tables: _Tables, name: str, first: str, second: str, *, bound: float = 0.0, what: str = "", fewer: bool = False
) -> Claim | _Tested:
    """Whether the second row's mean is above the first's by more than the bound, in points."""
    theirs, experiment = paper()[name], EXPERIMENTS[name]
    suite = experiment.mixture.partition("/")[0]
    sign, less = ">" if bound == 0 else "≥", ", from fewer parameters" if fewer else ""
    claim = Claim(
        claim=what or f"{second} {sign} {first} ({suite}-domain){less}",
        source=experiment.title.partition(":")[0],
        paper=f"{theirs[second]['AVG'] - theirs[first]['AVG']:+.2f}",
    )
    found = tables.find(name, [first, second])
    d = found and difference(*found[1], spread(tables.rows(name, found[0]).values()))
    if d is None:
        return claim
    profile, pair = found
    sizes = [row.records[0].parameters.trainable for row in pair]
    ours = f" with {1 - sizes[1] / sizes[0]:.0%} fewer" if fewer else ""
    mixture = pair[0].records[0].config.mixture
    tested = _tested(claim, d, bound, profile, mixture, pair, ours)
    return tested if not fewer or sizes[1] < sizes[0] else replace(tested.claim, verdict=FAILS)


def _tested(
    claim: Claim, d: Difference, bound: float, profile: str, mixture: str, of: list[TableRow], more: str = ""
) -> _Tested:
    margin = f"; worse only beyond {bound:+g}" if bound else ""
    ours = f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}] on {profile}, {mixture}{more}{margin}"
    ids = sorted({record.id for row in of for record in row.sources})
    claim = replace(claim, ours=ours, records=ids, profile=profile)
    return _Tested(claim, d.value > bound, d.p_against(bound), ", on these items (one seed)" if d.items_only else "")


def _beta(tables: _Tables) -> Claim | _Tested:
    """β = 1.25, the paper's for tasks that differ, against 1: each setting of ranks is a pair, as a seed is."""
    experiment, theirs = EXPERIMENTS["table12"], paper()["table12"]
    ones, others = ([e.title for e in experiment.entries if e.options["beta"] == beta] for beta in (1.0, 1.25))
    gains = [theirs[other]["AVG"] - theirs[one]["AVG"] for one, other in zip(ones, others, strict=True)]
    claim = Claim("β > 1 helps where tasks differ: 1.25 against 1", "Table 12", f"{np.mean(gains):+.2f}")
    if (found := tables.find("table12", ones + others)) is None:
        return claim
    profile, pairs = found
    by_seed = [{r.config.seed: r.items for r in row.records} for row in pairs]
    seeds = sorted(set.intersection(*(set(items) for items in by_seed)))
    sides = [[items[seed] for items in half for seed in seeds] for half in (by_seed[: len(ones)], by_seed[len(ones) :])]
    mixture = pairs[0].records[0].config.mixture
    more = f", over {len(ones)} settings of r and d"
    return _tested(claim, compare(*sides), 0.0, profile, mixture, pairs, more) if seeds else claim


def _alike(tables: _Tables, setting: str) -> Claim | _Tested:
    """How far each side's similarity is above chance, A's less B's, over runs of MoLoRA."""
    theirs = paper()["figure2"]
    claim = Claim(f"down sides are alike and up sides are not, {setting}", "Figure 2",
                  f"A {theirs['A'][setting]:g}, B {theirs['B'][setting]:g}")  # fmt: skip
    for profile in EVIDENCE:
        found = readings([*tables.rows("fig2", profile).values()], "mean")
        A, B = (found.get(("molora", setting, side), []) for side in "AB")
        if len(A) != len(B) or not A:
            continue
        sides = [np.array([(value, chance) for _, value, chance in side]) for side in (A, B)]
        above = [side[:, 0] - side[:, 1] for side in sides]
        text = ", ".join(f"{n} {s[:, 0].mean():.3f} (chance {s[:, 1].mean():.3f})" for n, s in zip("AB", sides))
        ids = sorted({record.id for record, _, _ in A})
        claim = replace(claim, ours=f"{text} on {profile}", records=ids, profile=profile)
        if len(A) == 1:
            return replace(claim, verdict=f"{UNDECIDED}, one run")
        test = ttest_1samp(above[0] - above[1], 0)
        low, high = test.confidence_interval(LEVEL)
        value = float(np.mean(above[0] - above[1]))
        ours = f"{claim.ours}, MoLoRA; A above chance by {value:+.3f} [{low:+.3f}, {high:+.3f}] more than B"
        return _Tested(replace(claim, ours=ours), value > 0, float(test.pvalue))
    return claim


def _fewer_parameters(rank: int) -> Claim:
    """Counted on the paper's backbone without weights, routers left out, as the paper's figures come out."""
    other = f"MoLoRA r={rank}"
    theirs = paper()["fewer_parameters_pct"][other]
    ours = 100 * (1 - _trainable("malora") / _trainable("molora", r=rank, lora_alpha=2 * rank))
    verdict = HOLDS if abs(ours - theirs) < 1 else FAILS
    return Claim(f"MALoRA trains {theirs}% fewer parameters than {other}", "section 3", f"{theirs}%",
                 f"{ours:.1f}%, counted on the 7B shape without routers", f"{verdict}, within a point")  # fmt: skip


@cache
def _trainable(method: str, **options: int) -> int:
    """Of one decoder layer of LLaMA-2 7B, since all are alike."""
    model = backbone(SHAPES["llama2-7b"], 1, torch.device("meta"))
    with torch.device("meta"):
        model = get_peft_model(model, malora.METHODS[method](**options))
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "router" not in name)


def _faster(speeds: list[SpeedRecord], by: str | None) -> Claim | _Tested:
    """MoLoRA's training step over MALoRA's: both through one backend, or each through its fastest."""
    theirs = paper()["table10"]
    ratio = theirs["MoLoRA"]["step_s"] / theirs["MALoRA"]["step_s"]
    how = f"both by {by}" if by else "each by its fastest backend"
    claim = Claim(f"MALoRA's training step is {ratio:.1f} times as fast as MoLoRA's, {how}", "Table 10", f"{ratio:.2f}")
    # First where most was measured: a method's fastest is not known of a record that has few of its rows.
    for record in sorted(speeds, key=compared, reverse=True):
        if (record.shape, record.mode) != ("llama2-7b", "train") or not record.complete:
            continue
        pair = []
        for method in ("molora", "malora"):
            mine = [r for r in exact_rows(record) if r.method == method and by in (None, r.backend)]
            ran = [r for r in mine if seconds(r) and len(by_round(record, r)) > 1]
            pair.append(min(ran, key=seconds, default=None))
        if None in pair:
            continue
        slow, fast = (np.log(by_round(record, row)) for row in pair)
        # What rounds to the paper's figure or more counts as it.
        bound = math.log(round(ratio, 1) - 0.05)
        test = ttest_ind(slow - bound, fast, equal_var=False)
        middle = math.exp(slow.mean() - fast.mean())
        low, high = np.exp(np.array(test.confidence_interval(LEVEL)) + bound)
        names = " over ".join(f"`{row.name}`" for row in pair)
        ours = f"{middle:.2f} [{low:.2f}, {high:.2f}], {names}"
        on = f", on {record.provenance.device}"
        return _Tested(
            replace(claim, ours=ours, records=[record.id], profile="speed"),
            math.log(middle) > bound,
            float(test.pvalue),
            on,
        )
    return claim


NOTES = (
    "Differences are in points of the mean over tasks, with 95% intervals, each method at its own rate. p is against "
    f"the claim's bound, corrected by Holm over the claims that were tested. ≥ and “no worse” allow {MARGIN:g} point."
)


def claims_table(found: list[Claim]) -> str:
    """Markdown; each record is a link below `results/`. What no record speaks to yet is named below the table."""
    body = []
    for c in (c for c in found if c.verdict != NOT_RUN):
        links = " ".join(f"[{i}](results/{c.profile}/runs/{id}.json)" for i, id in enumerate(c.records, 1))
        body.append([c.claim, c.source, c.paper, c.ours, f"**{c.verdict}**", links])
    table = tabulate(body, ["the paper's claim", "source", "the paper's", "ours", "verdict", "records"],
                     tablefmt="pipe", disable_numparse=True)  # fmt: skip
    waiting = "; ".join(f"{c.claim} ({c.source}: {c.paper})" for c in found if c.verdict == NOT_RUN)
    return "\n\n".join(filter(None, [table, NOTES, waiting and f"No whole record speaks to these yet: {waiting}."]))
