"""Tests of the paper's claims against the records.

A claim about scores is a paired difference of two table rows, tested against a bound: 0 for "better", -MARGIN for "no
worse", because a claim that something does not happen needs a margin. It holds if the difference is above the bound and
fails if it is below, at p < 0.05 with Holm's correction over the claims of its kind. Otherwise the paper's figure may
be excluded, or the claim is undecided; see `bench.report.verdicts`.

Tasks that the base model cannot learn do not count, neither in our difference nor in the paper's; see
`bench.report.learned`.

With one seed the variance between runs is taken from the mixture's rows with several. If no row has several, the test
covers the items only, and the verdict says so.

The tiny profile tests the harness and is no evidence about the paper. Of the other profiles the largest one with the
runs counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.stats import ttest_1samp, ttest_ind

import malora
from bench.experiments.methods import BASE
from bench.experiments.registry import EXPERIMENTS, TableEntry
from bench.records.schema import Record
from bench.records.speed_schema import SpeedRecord
from bench.report.learned import MIN_TASKS, SINGLE_TASK_ROW, learned_tasks, on_tasks, paper_difference
from bench.report.paper import paper
from bench.report.scores.adapter_tables import readings
from bench.report.scores.selection import Selection, TableRow, difference, mixture_rows, records_frame, select, spread
from bench.report.speed.summary import by_round, compared, exact_rows, seconds
from bench.report.stats import LEVEL, POWER, Difference, compare
from bench.report.verdicts import FAILS, HOLDS, NOT_TESTABLE, UNDECIDED, Claim, Evidence, Unjudged, judge
from malora.analysis.parameters import count_trainable
from tasks import TASKS

EVIDENCE = ("paper", "small")  # profiles, the largest first
MARGIN = 1.0  # points; the paper treats differences of this size as real
TOLERANCE = 1.0  # percentage points within which a count of parameters agrees with the paper's rounded one
# Inputs and outputs of the linear layers with an adapter, in one of LLaMA-2 7B's decoder layers, which are all alike.
LLAMA2_7B = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (4096, 11008)),
    "down_proj": (11008, 4096),
}

NOTES = (
    "Differences of scores are in points of the mean over the tasks that the base model can learn, with 95% intervals; "
    "the paper's are on the same tasks. A claim's page names them, the power of its test, and the sweep that chose the "
    "learning rates. Figure 2 has mean correlations; their chance levels are on the claims' pages. p is against the "
    "claim's bound, with Holm's correction over the claims of one kind: scores, similarity or speed. ≥ and “no worse” "
    f"allow {MARGIN:g} point. These kinds and the rule for tasks were "
    "fixed on 1 December 2026, when the scores of all records made until then were known."
)


def claims(records_by_profile: Mapping[str, Sequence[Record]], speeds: Sequence[SpeedRecord]) -> list[Claim]:
    """Return every claim that we test with its verdict.

    The claims are in the paper's order of importance.
    """
    tables = _Tables(records_by_profile)
    better = partial(_better, tables)
    found = [
        better("malora-over-molora-inter", "table1", "MoLoRA", "MALoRA", "MALoRA > MoLoRA (inter-domain)"),
        better("malora-over-molora-intra", "table2", "MoLoRA", "MALoRA", "MALoRA > MoLoRA (intra-domain)"),
        better("malora-over-lora-inter", "table1", "LoRA", "MALoRA", "MALoRA > LoRA (inter-domain)"),
        better("malora-over-lora-intra", "table2", "LoRA", "MALoRA", "MALoRA > LoRA (intra-domain)"),
        _small_is_no_worse(tables),
        *_ablations(tables),
        better("rank-48-no-worse-than-12", "table11", "MALoRA r=12 d=32 β=1", "MALoRA r=48 d=128 β=5",
               "a higher rank does not overfit MALoRA: 48 is no worse than 12", -MARGIN),
        _beta(tables),
        *(_similar(tables, setting) for setting in ("ST(S)", "ST(D)", "MT")),
        *(_fewer_parameters(rank) for rank in (12, 16)),
        *(_faster(speeds, backend) for backend in ("dispatch", None)),
    ]  # fmt: skip
    return judge(found)


class _Tables:
    """Rows by experiment, profile and title, each method at its own rate."""

    def __init__(self, records: Mapping[str, Sequence[Record]]) -> None:
        self.frames = {profile: records_frame(records.get(profile, [])) for profile in EVIDENCE}
        self._rows: dict[tuple[str, str], dict[str, TableRow]] = {}
        self._selections: dict[tuple[str, str], Selection] = {}

    def selection(self, name: str, profile: str) -> Selection:
        """Return the records of an experiment."""
        if (name, profile) not in self._selections:
            self._selections[name, profile] = select(EXPERIMENTS[name], profile, self.frames[profile])
        return self._selections[name, profile]

    def rows(self, name: str, profile: str) -> dict[str, TableRow]:
        """Return the rows of an experiment by title."""
        if (name, profile) not in self._rows:
            selection = self.selection(name, profile)
            self._rows[name, profile] = {row.title: row for row in selection.rows(selection.at_own_rate)}
        return self._rows[name, profile]

    def learned(self, name: str, profile: str) -> list[str] | None:
        """Return the tasks of an experiment that the base can learn, or None if no single-task runs tell."""
        if EXPERIMENTS[name].mixture != EXPERIMENTS["table1"].mixture:
            return None
        alone = self.rows("table1", profile).get(SINGLE_TASK_ROW)
        base = self.selection("table1", profile).rows({BASE: None}, [TableEntry(BASE)])
        if not (alone and alone.records and base and base[0].records):
            return None
        return learned_tasks(alone.records[0], base[0].records[0])

    def find(self, name: str, titles: Sequence[str]) -> tuple[str, list[TableRow]] | None:
        """Return these rows and their profile.

        The profile is the largest one that has scores of all of them.
        """
        for profile in EVIDENCE:
            found = self.rows(name, profile)
            if all(title in found and found[title].records for title in titles):
                return profile, [found[title] for title in titles]
        return None


def _better(
    tables: _Tables, key: str, table: str, first: str, second: str, text: str, bound: float = 0.0
) -> Claim | Unjudged:
    """Test whether the second row's mean is above the first's by more than a bound.

    The bound is in points.
    """
    experiment, theirs = EXPERIMENTS[table], paper_difference(table, first, second)
    claim = Claim(text, experiment.title.partition(":")[0], f"{theirs:+.2f}", key=key)
    found = tables.find(table, [first, second])
    if found is None:
        return claim
    profile, pair = found
    selection = tables.selection(table, profile)
    alike = mixture_rows(selection, selection.at_own_rate)
    tasks = list(pair[0].records[0].test or {})
    learned, at_floor = tables.learned(table, profile), ""
    if learned is not None and (floor := [task for task in tasks if task not in learned]):
        if len(tasks) - len(floor) < MIN_TASKS:
            return replace(claim, verdict=NOT_TESTABLE)
        tasks = [task for task in tasks if task in learned]
        at_floor, overall = describe_floor(table, first, second, floor), theirs
        theirs = paper_difference(table, first, second, tasks)
        claim = replace(claim, paper=f"{theirs:+.2f}; all tasks {overall:+.2f}")
        pair, alike = ([on_tasks(row, tasks) for row in rows] for rows in (pair, alike))
    d = difference(pair[0], pair[1], spread(alike))
    if d is None:
        return claim
    columns = {row.title: {str(r.config.seed): r.mean() or 0.0 for r in row.records} for row in pair}
    common = len(set.intersection(*map(set, columns.values())))
    names = ", ".join(TASKS[task].title for task in tasks)
    what = f"The difference of the means over {names}, {second} less {first}, in points.{at_floor}"
    evidence = Evidence(
        f"rates from the sweeps of {selection.rates.source.title.partition(':')[0]}",
        f"{what} {_describe_test(d, common, 'seeds')}",
        "seed",
        columns,
    )
    return _score_claim(claim, d, bound, theirs, profile, pair, evidence)


def describe_floor(table: str, first: str, second: str, floor: Sequence[str]) -> str:
    """Name the tasks at floor, and the paper's difference on them."""
    names = ", ".join(TASKS[task].title for task in floor)
    theirs = paper_difference(table, first, second, floor)
    return (
        f" At floor, not testable with this base and left out: {names}. On them the paper's difference is "
        f"{theirs:+.2f} points on average."
    )


def _describe_test(d: Difference, pairs: int, unit: str) -> str:
    """Describe the test of a difference."""
    freedom = f"Student's t with {d.freedom:.1f} degrees of freedom (Welch and Satterthwaite)."
    if d.items_only:
        return f"One seed in common, so the test is paired over the test items only. {freedom}"
    if pairs > 1:
        return f"Paired over {pairs} {unit} and over the test items. {freedom}"
    return (
        "Paired over the test items. With fewer than two seeds in common, the variance between runs is that of all "
        f"rows of this mixture with several seeds. {freedom}"
    )


def _score_claim(
    claim: Claim,
    d: Difference,
    bound: float,
    theirs: float,
    profile: str,
    rows: Sequence[TableRow],
    evidence: Evidence,
) -> Unjudged:
    """Return a claim about a difference of scores with its figures and records.

    The bound and the paper's difference, `theirs`, are in points.
    """
    setting = f"profile {profile}, mixture {rows[0].records[0].config.mixture}"
    setting += f", {evidence.setting}" if evidence.setting else ""
    margin = f" The claim fails only if the difference is below {bound:+g} points." if bound else ""
    margin += (
        f" Before correction, a difference of {d.smallest:.1f} points from the bound is shown in {POWER:.0%} of such "
        f"experiments, and the paper's {theirs:+.2f} in {d.power_at(theirs, bound):.0%}."
    )
    claim = replace(
        claim,
        ours=f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]",
        records=sorted({record.id for row in rows for record in row.sources}),
        profile=profile,
        evidence=replace(evidence, setting=setting, test=evidence.test + margin),
    )
    limit = "on these items (one seed)" if d.items_only else ""
    return Unjudged(claim, d.value > bound, d.p_against(bound), "score", limit, d.p_against(theirs))


def _small_is_no_worse(tables: _Tables) -> Claim | Unjudged:
    """Test whether MALoRA-Small is no worse than MoLoRA with fewer parameters."""
    first, second = "MoLoRA", "MALoRA-Small"
    text = f"{second} ≥ {first} (inter-domain), from fewer parameters"
    tested = _better(tables, "malora-small-no-worse-than-molora-inter", "table1", first, second, text, -MARGIN)
    found = tables.find("table1", [first, second])
    if not isinstance(tested, Unjudged) or found is None:
        return tested
    larger, smaller = (row.trainable or 0 for row in found[1])
    if smaller >= larger:
        return replace(tested.claim, verdict=FAILS)
    assert tested.claim.evidence is not None
    fewer = f" {second} has {1 - smaller / larger:.0%} fewer trainable parameters than {first}."
    evidence = replace(tested.claim.evidence, test=tested.claim.evidence.test + fewer)
    return replace(tested, claim=replace(tested.claim, evidence=evidence))


def _ablations(tables: _Tables) -> list[Claim | Unjudged]:
    """Test whether MALoRA is better than each of its ablations in Table 3."""
    entries = [e for e in EXPERIMENTS["table3"].entries if e.tuning_group == "malora" and e.method != "malora"]
    return [
        _better(tables, f"ablation-{entry.method.removeprefix('malora-')}", "table3", entry.title, "MALoRA",
                f"the ablation “{entry.title}” hurts")
        for entry in entries
    ]  # fmt: skip


def _beta(tables: _Tables) -> Claim | Unjudged:
    """Test the paper's β for tasks that differ, 1.25, against 1.

    Each setting of r and d is a pair, as a seed is.
    """
    experiment, theirs = EXPERIMENTS["table12"], paper()["table12"]
    ones, others = ([e.title for e in experiment.entries if e.options["beta"] == beta] for beta in (1.0, 1.25))
    gains = [theirs[other]["AVG"] - theirs[one]["AVG"] for one, other in zip(ones, others, strict=True)]
    claim = Claim(
        "β > 1 helps where tasks differ: 1.25 against 1", "Table 12", f"{np.mean(gains):+.2f}", key="beta-above-1"
    )
    if (found := tables.find("table12", ones + others)) is None:
        return claim
    profile, rows = found
    by_seed = [{record.config.seed: record for record in row.records} for row in rows]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    if not seeds:
        return claim
    halves = by_seed[: len(ones)], by_seed[len(ones) :]
    d = compare(*([runs[seed].items or {} for runs in half for seed in seeds] for half in halves))
    names = [title.removeprefix("MALoRA ").rpartition(" ")[0] for title in ones]
    columns = {
        title: {
            f"{name}, seed {seed}": runs[seed].mean() or 0.0
            for name, runs in zip(names, half, strict=True)
            for seed in seeds
        }
        for title, half in zip(("β = 1", "β = 1.25"), halves, strict=True)
    }
    test = (
        f"The difference of the means over tasks, β = 1.25 less β = 1, in points, over {len(ones)} settings of r and "
        f"d. Each setting is a pair, as a seed is. {_describe_test(d, len(ones) * len(seeds), 'pairs')}"
    )
    evidence = Evidence("", test, "setting", columns)
    return _score_claim(claim, d, 0.0, float(np.mean(gains)), profile, rows, evidence)


SIMILARITY_KEYS = {"ST(S)": "similarity-one-task", "ST(D)": "similarity-two-tasks", "MT": "similarity-multi-task"}


def _similar(tables: _Tables, setting: str) -> Claim | Unjudged:
    """Test the similarity of MoLoRA's down projections against its up projections.

    The test is whether the down projections are further above chance similarity.
    """
    theirs = paper()["figure2"]
    claim = Claim(
        f"down projections are alike and up projections are not, {setting}",
        "Figure 2",
        f"A {theirs['A'][setting]:g}, B {theirs['B'][setting]:g}",
        key=SIMILARITY_KEYS[setting],
    )
    for profile in EVIDENCE:
        found = readings([*tables.rows("fig2", profile).values()], "mean")
        A, B = (found.get(("molora", setting, matrix), []) for matrix in "AB")
        if A and len(A) == len(B):
            return _similarity_claim(claim, profile, A, B)
    return claim


def _similarity_claim(
    claim: Claim, profile: str, A: list[tuple[Record, float, float]], B: list[tuple[Record, float, float]]
) -> Claim | Unjudged:
    values = {
        f"{name}, {what}": {record.id: reading[index] for record, *reading in found}
        for name, found in (("A", A), ("B", B))
        for index, what in enumerate(("correlation", "chance"))
    }
    above_A, above_B = (np.array([value - chance for _, value, chance in found]) for found in (A, B))
    gap = above_A - above_B
    test = (
        "Mean canonical correlation of two experts of MoLoRA. A is the down projection, B the up projection. Tested is "
        "A's correlation above its chance level less that of B, with Student's t over runs"
    )
    claim = replace(
        claim,
        ours=", ".join(
            f"{name} {np.mean([value for _, value, _ in found]):.3f}" for name, found in (("A", A), ("B", B))
        ),
        records=sorted({record.id for record, _, _ in A}),
        profile=profile,
    )
    evidence = Evidence(f"profile {profile}, MoLoRA", f"{test}: {gap.mean():+.3f}", "run", values)
    if len(A) == 1:
        return replace(claim, verdict=f"{UNDECIDED}, one run", evidence=replace(evidence, test=f"{evidence.test}."))
    result = ttest_1samp(gap, 0)
    low, high = result.confidence_interval(LEVEL)
    evidence = replace(evidence, test=f"{evidence.test} [{low:+.3f}, {high:+.3f}].")
    return Unjudged(replace(claim, evidence=evidence), bool(gap.mean() > 0), float(result.pvalue), "similarity")


def _fewer_parameters(rank: int) -> Claim:
    """Count the parameters on the paper's backbone, without routers.

    The paper leaves routers out.
    """
    other = f"MoLoRA r={rank}"
    theirs = paper()["fewer_parameters_pct"][other]
    counts = {"MALoRA": _trainable("malora"), other: _trainable("molora", r=rank, lora_alpha=2 * rank)}
    ours = 100 * (1 - counts["MALoRA"] / counts[other])
    test = f"A count, without routers. It holds if it is within {TOLERANCE:g} percentage point of the paper's."
    return Claim(
        f"MALoRA trains {theirs}% fewer parameters than {other}",
        "section 3",
        f"{theirs}%",
        f"{ours:.1f}%",
        f"{HOLDS}, within a point" if abs(ours - theirs) < TOLERANCE else FAILS,
        key=f"parameters-fewer-than-molora-r{rank}",
        evidence=Evidence(
            "one decoder layer of LLaMA-2 7B",
            test,
            "method",
            {"trainable parameters": {name: float(count) for name, count in counts.items()}},
        ),
    )


def _trainable(method: str, **options: int) -> int:
    """Return the trainable parameters in one decoder layer of LLaMA-2 7B."""
    config = malora.make_config(method, **options)
    return sum(count_trainable(config, *sizes, router=False) for sizes in LLAMA2_7B.values())


def _faster(speeds: Sequence[SpeedRecord], backend: str | None) -> Claim | Unjudged:
    """Test the ratio of MoLoRA's training step to MALoRA's.

    The steps are with one backend or with each method's fastest.
    """
    theirs = paper()["table10"]
    ratio = theirs["MoLoRA"]["step_s"] / theirs["MALoRA"]["step_s"]
    how = f"both by {backend}" if backend else "each by its fastest backend"
    claim = Claim(
        f"MALoRA's training step is {ratio:.1f} times as fast as MoLoRA's, {how}",
        "Table 10",
        f"{ratio:.2f}",
        key=f"faster-step-{backend or 'fastest'}",
    )
    # A record with few rows does not say which of a method's backends is the fastest, so the one with most comes first.
    for record in sorted(speeds, key=compared, reverse=True):
        if (record.shape, record.mode) != ("llama2-7b", "train") or not record.complete:
            continue
        pair = []
        for method in ("molora", "malora"):
            mine = [r for r in exact_rows(record) if r.method == method and backend in (None, r.backend)]
            ran = [(s, r) for r in mine if (s := seconds(r)) and len(by_round(record, r)) > 1]
            pair += [row for _, row in sorted(ran, key=lambda one: one[0])[:1]]
        if len(pair) == 2:
            slow, fast = (by_round(record, row) for row in pair)
            return _speed_claim(claim, record, {pair[0].name: slow, pair[1].name: fast}, ratio)
    return claim


def _speed_claim(claim: Claim, record: SpeedRecord, steps: dict[str, np.ndarray], ratio: float) -> Unjudged:
    """Return a claim about the ratio of two variants' steps.

    The steps are given as seconds by round.
    """
    slow, fast = map(np.log, steps.values())
    bound = math.log(round(ratio, 1) - 0.05)  # all that rounds to the paper's figure counts as it
    result = ttest_ind(slow - bound, fast, equal_var=False)
    middle = math.exp(slow.mean() - fast.mean())
    low, high = np.exp(np.array(result.confidence_interval(LEVEL)) + bound)
    names = " and ".join(f"`{name}`" for name in steps)
    test = (
        f"The ratio of the seconds of a training step of {names}. Welch's test on the logarithms of the means by "
        f"round, against the smallest ratio that rounds to the paper's, {math.exp(bound):.2f}."
    )
    device = record.provenance.device
    columns = {
        f"{name}, s": {str(number): float(value) for number, value in enumerate(values, 1)}
        for name, values in steps.items()
    }
    claim = replace(
        claim,
        ours=f"{middle:.2f} [{low:.2f}, {high:.2f}]",
        records=[record.id],
        profile="speed",
        evidence=Evidence(f"shape {record.shape}, {device}", test, "round", columns),
    )
    return Unjudged(claim, math.log(middle) > bound, float(result.pvalue), "speed", f"on {device}")
