"""Verdicts follow from records; a claim without records is not run."""

import pytest

from bench.experiments.registry import EXPERIMENTS
from bench.records.schema import Record
from bench.records.speed_schema import SpeedRecord
from bench.report.claim_pages import FRONT_PAGE, claim_files, claim_page, front_page_claims
from bench.report.claims import claims
from bench.report.verdicts import Claim, Unjudged, judge
from tasks import MIXTURES
from tests.bench.conftest import CLEAN
from tests.bench.records.test_store import make

RATE = 1e-3
# The analyses of an adapter that no claim reads.
OTHER_ANALYSES = {
    "spectra": {matrix: {"values": [1.0], "stable_rank": 1.0, "effective_rank": 1.0} for matrix in "AB"},
    "movement": {"factor": "A", "relative": [0.1], "angle": 1.0},
    "routing": {"entropy": {}, "largest_share": {}, "unused": {}, "load": [], "task_information": []},
}


def run(experiment, title, seed=0, right=0.5, n=400, profile="small", trainable=100, wobble=0.0, **options):
    """A record of a row of the small profile, whose accuracy wobbles with the seed."""
    entry = next(e for e in EXPERIMENTS[experiment].entries if e.title == title)
    record = make(seed, method=entry.method, rate=RATE, right=right + wobble * (seed - 1), n=n, **options)
    mixture = {"table2": "intra", "table12": "intra", "fig2": "intra"}.get(experiment, "inter-open")
    usual = {"beta": 1.25} if mixture == "intra" and entry.method.startswith("malora") else {}
    record.config = record.config.replace(profile=profile, mixture=mixture, method_options={**usual, **entry.options})
    record.parameters = {"trainable": trainable, "total": 9, "adapter_bytes": 9}
    return record


def swept(records):
    """With a second rate that is worse, so that RATE is each tuning group's own."""
    more = []
    for record in records:
        if record.config.seed == 0:
            low = {task: score.replace(value=0.0) for task, score in record.validation.items()}
            more.append(record.replace(config=record.config.replace(learning_rate=1e-4), validation=low))
    return [*records, *more]


def verdict(found, start):
    (claim,) = [c for c in found if c.claim.startswith(start)]
    return claim


def test_without_records_nothing_is_run_but_parameters_are_counted():
    found = claims({}, [])
    assert {c.verdict for c in found if "parameters than" not in c.claim} == {"not run"}
    assert len({c.claim for c in found}) == len(found)


@pytest.mark.parametrize("other, share", [("MoLoRA r=12", "29.8%"), ("MoLoRA r=16", "47.3%")])
def test_fewer_parameters_are_counted_on_the_papers_backbone(other, share):
    """Compute the shares from the paper's totals less its routers.

    The first is 1 - (158,859,264 - 8,060,928) / (222,756,864 - 8,060,928), and the second is that of r=16.
    """
    (claim,) = [c for c in claims({}, []) if c.claim.endswith(other)]
    assert claim.ours.startswith(share) and claim.verdict.startswith("holds")


@pytest.mark.parametrize(
    "molora, malora, expected", [(0.5, 0.7, "holds"), (0.7, 0.5, "fails"), (0.5, 0.5025, "undecided")]
)
def test_three_seeds_that_agree_decide(molora, malora, expected):
    rows = [run("table2", "MoLoRA", s, molora, wobble=0.01) for s in range(3)]
    rows += [run("table2", "MALoRA", s, malora, wobble=0.015) for s in range(3)]
    claim = verdict(claims({"small": swept(rows)}, []), "MALoRA > MoLoRA (intra")
    assert claim.verdict.startswith(expected) and "one seed" not in claim.verdict
    assert (
        len(claim.records) == 6 and claim.paper == "+0.78" and "profile small, mixture intra" in claim.evidence.setting
    )


def test_one_seed_is_limited_to_its_items():
    rows = [run("table2", "MoLoRA", right=0.5), run("table2", "MALoRA", right=0.7)]
    claim = verdict(claims({"small": swept(rows)}, []), "MALoRA > MoLoRA (intra")
    assert claim.verdict == "holds, on these items (one seed)"


def test_one_seed_takes_the_variance_of_rows_with_several():
    rows = [run("table2", "MoLoRA", right=0.5), run("table2", "MALoRA", right=0.7)]
    for right, expected in ((0.02, "holds"), (0.2, "undecided")):
        others = [run("table2", "DoRA", seed, 0.5 + right * (seed - 1)) for seed in range(3)]
        claim = verdict(claims({"small": swept([*rows, *others])}, []), "MALoRA > MoLoRA (intra")
        assert claim.verdict == expected


def test_holm_counts_the_claims_of_one_kind():
    """Check that a difference that one test would call real is not among two.

    p = 0.03 and 0.9 become 0.06 and 0.9.
    """
    pair = [
        run("table2", "MoLoRA", right=0.5),
        run("table2", "MALoRA", right=0.5125),
    ]  # 5 items more of 400, both tasks
    alone = verdict(claims({"small": swept(pair)}, []), "MALoRA > MoLoRA (intra")
    rows = swept([*pair, run("table2", "LoRA", right=0.5125)])
    both = verdict(claims({"small": rows}, [speed(12.0, 10.0)]), "MALoRA > MoLoRA (intra")
    assert both.p == pytest.approx(2 * alone.p) and both.evidence.p == alone.evidence.p == alone.p


def test_the_papers_figure_is_excluded_where_no_test_decides():
    """Of three claims one fails. Of the other two, 0.02 counts twice, because 0.001 comes before it."""
    near = Unjudged(Claim("near", "Table 1", "+3"), above=True, p=0.6, family="score", paper_p=0.02)
    far = Unjudged(Claim("far", "Table 1", "+3"), above=False, p=0.01, family="score", paper_p=0.001)
    open_ = Unjudged(Claim("open", "Table 1", "+3"), above=True, p=0.3, family="score", paper_p=0.4)
    assert [c.verdict for c in judge([near, far, open_])] == ["the paper's figure is excluded", "fails", "undecided"]
    # Two more figures of this kind: 0.02 counts four times, and those of another kind do not count.
    assert next(c.verdict for c in judge([near, far, open_, open_, open_])) == "undecided"
    speed_claim = Unjudged(Claim("speed", "Table 10", "1.2"), above=True, p=0.04, family="speed")
    assert [c.verdict for c in judge([near, speed_claim])] == ["the paper's figure is excluded", "holds"]


def scored(record, mixture, **scores):
    """The record with these scores of 400 items, in percent."""
    items = {task: [int(i < 4 * right) for i in range(400)] for task, right in scores.items()}
    tests = {
        task: {"metric": "acc_norm", "value": right / 100, "stderr": 0.02, "n": 400, "version": 1}
        for task, right in scores.items()
    }
    if mixture != "inter-open":
        names = {"medicine": ["medmcqa"], "code": [], "finance": [], "mathematics": ["gsm8k"], "data_to_text": [],
                 "general": ["arc_challenge", "arc_easy"]}[mixture.rpartition("/")[2]]  # fmt: skip
        items, tests = ({name: found[name] for name in names} for found in (items, tests))
    config = record.config.replace(mixture=mixture, learning_rate=record.config.learning_rate and 5e-4)
    return Record.model_validate(record.model_dump() | {"config": config, "test": tests, "items": items})


def test_claims_compare_the_tasks_that_the_base_can_learn_with_the_papers_on_them():
    """MedMCQA at 30% is within three errors of 25%. On the others the paper has +1.0, -1.1 and +0.4 points."""
    alone = {"medmcqa": 30, "gsm8k": 12, "arc_challenge": 35, "arc_easy": 50}
    rows = [
        scored(run("table1", "LoRA (ST)"), name, **alone)
        for name in MIXTURES if name.startswith("inter-open/")
    ]  # fmt: skip
    base = make(0, method="base", rate=None, validation=None)
    base.config = base.config.replace(profile="small", method_options={})
    rows += [scored(base, "inter-open", medmcqa=25, gsm8k=2, arc_challenge=25, arc_easy=40)]
    for title, gain in (("MoLoRA", 0), ("MALoRA", 10)):
        for seed in range(3):
            scores = {"medmcqa": 25 + 40 * gain, "gsm8k": 12, "arc_challenge": 35 + gain, "arc_easy": 50 + seed}
            rows.append(scored(run("table1", title, seed), "inter-open", **scores | {"medmcqa": 25 + 2 * gain}))
    claim = verdict(claims({"small": rows}, []), "MALoRA > MoLoRA (inter")
    assert claim.ours.startswith("+3.33 [") and claim.paper == "+0.10; all tasks +1.00"
    assert "means over GSM8K, ARC-C, ARC-E, MALoRA less" in claim.evidence.test
    assert "left out: MedMCQA. On them the paper's difference is +0.20 points" in claim.evidence.test
    at_floor = [scored(r, r.config.mixture, **dict.fromkeys(alone, 25)) if "/" in r.config.mixture else r for r in rows]
    assert verdict(claims({"small": at_floor}, []), claim.claim).verdict == "not testable"


def test_no_worse_has_a_margin_and_needs_fewer_parameters():
    rows = [run("table1", "MoLoRA", s, wobble=0.01, trainable=100) for s in range(3)]
    small = [run("table1", "MALoRA-Small", s, wobble=0.01, trainable=70) for s in range(3)]
    for record in rows + small:
        record.config = record.config.replace(learning_rate=5e-4)
    claim = verdict(claims({"small": rows + small}, []), "MALoRA-Small")
    assert claim.verdict == "holds" and "30% fewer trainable parameters" in claim.evidence.test
    for record in small:
        record.parameters = record.parameters.replace(trainable=130)
    assert verdict(claims({"small": rows + small}, []), "MALoRA-Small").verdict == "fails"


def test_ablations_and_beta():
    rows = [run("table3", "MALoRA", right=0.7), run("table3", "w/o ft P_t", right=0.5)]
    gains = [
        run("table12", e.title, right=0.6 if e.options["beta"] == 1.25 else 0.5)
        for e in EXPERIMENTS["table12"].entries
        if e.options["beta"] in (1.0, 1.25)
    ]
    found = claims({"small": rows + gains}, [])  # at no swept rate: the paper's
    assert verdict(found, "the ablation “w/o ft P_t”").verdict == "not run"
    for record in rows + gains:
        rate = 5e-4 if record.config.mixture == "inter-open" else 4e-4
        record.config = record.config.replace(learning_rate=rate)
    found = claims({"small": rows + gains}, [])
    assert verdict(found, "the ablation “w/o ft P_t”").verdict == "holds, on these items (one seed)"
    assert verdict(found, "the ablation “decomposing").verdict == "not run"
    beta = verdict(found, "β > 1")
    assert beta.verdict == "holds" and "+10.00" in beta.ours and len(beta.records) == 8


def test_the_tiny_profile_is_no_evidence():
    rows = [run("table2", title, s, profile="tiny", wobble=0.01) for title in ("MoLoRA", "MALoRA") for s in range(3)]
    assert verdict(claims({"tiny": rows}, []), "MALoRA > MoLoRA (intra").verdict == "not run"


@pytest.mark.parametrize("A, expected", [(0.4, "holds"), (0.05, "fails")])
def test_similarity_is_compared_with_its_chance_level(A, expected):
    rows = []
    for seed in range(3):
        means = {"A": [A + 0.01 * seed, 0.1], "B": [0.2 + 0.01 * seed**2, 0.1]}
        inside = {"similarity": {"within": {"mean": means, "mean_square": means}}} | OTHER_ANALYSES
        rows.append(run("fig2", "MoLoRA", seed, inside=inside))
        rows[-1].config = rows[-1].config.replace(learning_rate=4e-4)
    claim = verdict(claims({"small": rows}, []), "down projections are alike and up projections are not, MT")
    assert claim.verdict == expected and claim.paper == "A 0.37, B 0.012"
    assert claim.ours == f"A {A + 0.01:.3f}, B 0.217"
    assert set(claim.evidence.columns["A, chance"].values()) == {0.1}
    assert verdict(claims({"small": rows[:1]}, []), claim.claim).verdict == "undecided, one run"


def speed(molora, malora, backend="dispatch", rounds=10, steps=1):
    def row(method, step):
        samples = [step * (1 + 0.001 * i) for i in range(rounds) for _ in range(steps)]
        return {"name": f"{method}-{backend}", "method": method, "backend": backend, "status": "ok",
                "seconds": {"step": samples}}  # fmt: skip

    options = {"variant": "all", "sweep": None, "batch": 1, "length": 8, "tokens": 8, "dropout": 0.0,
               "rounds": rounds, "layers": None, "flops": 1}  # fmt: skip
    rates = {"matrix_flops_per_second": 1.0, "copy_bytes_per_second": 1.0}
    return SpeedRecord(
        shape="llama2-7b",
        mode="train",
        options=options,
        provenance=CLEAN.replace(device="a GPU"),
        peak_rates={"before": rates, "after": rates},
        rows=[row("molora", molora), row("malora", malora)],
    )


def test_faster_is_from_records_of_speed():
    found = claims({}, [speed(12.0, 10.0)])
    same = verdict(found, "MALoRA's training step is 1.2 times as fast as MoLoRA's, both by dispatch")
    assert same.ours.startswith("1.20 [1.2") and same.verdict == "holds, on a GPU" and same.profile == "speed"
    # Steps of one round are one observation, and of one there is no interval.
    assert verdict(claims({}, [speed(12.0, 10.0, steps=3)]), same.claim).ours == same.ours
    for other in (speed(10.0, 10.0, "fused"), speed(12.0, 10.0, rounds=1, steps=9)):
        assert verdict(claims({}, [other]), same.claim).verdict == "not run"
    fastest = verdict(claims({}, [speed(10.0, 10.0, "fused")]), same.claim.replace("both by dispatch", "each by its"))
    assert fastest.verdict == "fails, on a GPU"
    of_more = speed(10.0, 10.0, "fused")
    of_more.rows.append(of_more.rows[0].replace(name="lora-plain-compiled", method="lora"))
    later = speed(12.0, 10.0)
    later = later.replace(provenance=later.provenance.replace(time="2026-01-02T00:00:00Z"))
    assert verdict(claims({}, [of_more, later]), fastest.claim).records == [of_more.id]
    assert verdict(claims({}, [of_more, later]), same.claim).records == [later.id]


def test_a_page_has_the_test_the_values_and_links_to_the_records():
    rows = swept([run("table2", "MoLoRA", seed, 0.5, wobble=0.01) for seed in range(3)])
    rows += swept([run("table2", "MALoRA", seed, 0.7, wobble=0.01) for seed in range(3)])
    claim = verdict(claims({"small": rows}, []), "MALoRA > MoLoRA (intra")
    page = claim_page(claim)
    assert f"Ours, with its 95% interval: {claim.ours}. Verdict: **holds**." in page
    assert "Paired over 3 seeds and over the test items." in page and f"p = {claim.evidence.p:.2g}, and" in page
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert cells == [["seed", "MoLoRA", "MALoRA"], ["0", "49.00", "69.00"], ["1", "50.00", "70.00"],
                     ["2", "51.00", "71.00"], ["mean", "50.00", "70.00"]]  # fmt: skip
    assert page.count("../small/runs/") == len(claim.records) == 6
    assert f"- [{claim.records[0]}](../small/runs/{claim.records[0]}.json)" in page


def test_every_claim_has_a_page_and_a_line_of_short_cells():
    found = claims({}, [])
    files = claim_files(found)
    assert len(files) == len(found) + 1 and all("No complete record" in claim_page(c) for c in found if not c.evidence)
    lines = [line for line in files["claims.md"].splitlines() if line.startswith("| ")]
    assert len(lines) == len(found) + 1
    for claim, line in zip(found, lines[1:], strict=True):
        assert line.count("](") == 1 and f"(claims/{claim.key}.md)" in line
        assert max(len(cell.strip()) for cell in line.split("|")) < 90


def test_the_front_page_has_the_same_claims_whatever_their_verdicts():
    rows = swept([run("table2", "MoLoRA", right=0.5), run("table2", "MALoRA", right=0.7)])
    for found in (claims({}, []), claims({"small": rows}, [])):
        lines = front_page_claims(found).splitlines()
        assert [line.split("|")[1].strip() for line in lines[2:7]] == [
            next(c.claim for c in found if c.key == key) for key in FRONT_PAGE
        ]
        assert "results/claims.md" in lines[-1] and sum("](" in line for line in lines) == 1
