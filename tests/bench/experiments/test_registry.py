"""The tables of the paper as lists of runs, and the whole path of each in miniature."""

from dataclasses import replace

import pytest

import malora
from bench.cli.parser import main
from bench.experiments.methods import BASE
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import EXPERIMENTS, TableEntry, parts
from bench.records import store
from bench.report.paper import paper
from bench.runs.plan import plan_runs
from tests.bench.conftest import SOURCE, make_setting


def options(experiment, title):
    entry = next(entry for entry in EXPERIMENTS[experiment].entries if entry.title == title)
    return malora.METHODS[entry.method](**entry.options)


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table11", "table12"])
def test_a_table_has_the_papers_rows(name):
    assert {entry.title for entry in EXPERIMENTS[name].entries} == set(paper()[name]) - {"base, no adapter"}


def test_the_rows_have_the_papers_sizes():
    """Section 3 and Table 12: as many parameters an expert at every (r, d), that is 8 r + d = 128 of rows."""
    for entry in EXPERIMENTS["table12"].entries:
        config = malora.METHODS[entry.method](**entry.options)
        assert entry.title == f"MALoRA r={config.r} d={config.d} β={config.beta:g}"
        assert 8 * config.r + config.d == 128 and config.scaling == 2
    config = options("table11", "MALoRA r=48 d=128 β=5")
    assert (config.r, config.d, config.beta, config.scaling) == (48, 128, 5, 2)
    assert options("table11", "MoLoRA r=8") == malora.METHODS["molora"]()
    assert options("fig5", "AsyLoRA r=256").freeze == ["A"] and options("fig5", "LoRA r=8").lora_alpha == 16


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_each_run_is_of_one_row(experiment, base_folder, tmp_path):
    """At the tiny profile's ranks too, where some might fall together."""
    setting = replace(make_setting(base_folder, tmp_path), mixture=experiment.mixture)
    for wave in plan_runs(setting, experiment, list(experiment.entries), 1, {}):
        for config, _ in wave:
            of = [entry.title for entry in experiment.entries if experiment.has(entry, config)]
            assert len(of) == (config.method != BASE), (config.id, of)


def test_a_row_has_the_rate_of_its_family():
    assert TableEntry("malora-frozen-p").tuning_group == "malora" and TableEntry("moasylora").tuning_group == "molora"
    assert TableEntry("malora-small", own_rate=True).tuning_group == "malora-small"


def test_every_mixture_has_its_parts():
    assert parts("intra") == [f"intra/{t}" for t in ("piqa", "openbookqa", "boolq", "arc_challenge", "arc_easy")]
    assert "inter-open/mathematics" in parts("inter-open") and len(parts("inter")) == 6


def scored(model, tokenizer, examples, **options):
    """Instead of lm-eval, which takes a second a run and is tested elsewhere."""
    row = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 2, "version": 2}
    return {task: dict(row) for task in examples}, {task: [0, 1] for task in examples}


@pytest.mark.parametrize(
    "name, titles, lines",
    [
        ("table1", ["LoRA (ST)", "LoRA"], ["| LoRA (ST) |", "| *LoRA (ST), the paper's*"]),
        ("table3", ["MALoRA", "fixed S_A r=16"], ["reference", "| fixed S_A r=16"]),
        ("table11", ["MoLoRA r=4", "MALoRA r=48 d=128 β=5"], ["| MoLoRA r=4", "*56.7*"]),
        ("table12", ["MALoRA r=14 d=16 β=0.5", "MALoRA r=8 d=64 β=2"], ["| MALoRA r=8 d=64 β=2"]),
        ("fig2", ["MALoRA", "MALoRA (ST)"], ["| MALoRA | ST(S)", "| MALoRA | ST(D)", "| MALoRA | MT, at the start"]),
        ("fig3", ["MoLoRA"], ["## Spectra", "## Routing by task", "| MoLoRA | A_t"]),
        ("fig5", ["AsyLoRA r=16"], ["| AsyLoRA r=16"]),
    ],
)
def test_the_whole_path_in_miniature(name, titles, lines, base_folder, tmp_path, capsys, monkeypatch):
    experiment = EXPERIMENTS[name]
    few = tuple(
        replace(entry, seeds=2 if name == "fig2" else 1) for entry in experiment.entries if entry.title in titles
    )
    monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, entries=few))
    monkeypatch.setitem(PROFILES, "tiny", replace(PROFILES["tiny"], source=SOURCE))
    if name != "table1":  # with generation, and parts of a mixture
        monkeypatch.setattr("bench.runs.run.score", scored)
    if experiment.figure:
        monkeypatch.setattr("bench.runs.plan.parts", lambda mixture: [f"{mixture}/lexicon", f"{mixture}/second"])
    command = f"{name} --profile tiny --max-steps 1 --max-items 2 --jobs 1".split()
    command += ["--model", str(base_folder), "--results", str(tmp_path)]
    assert main(command) == 0
    packed = " ".join((tmp_path / f"{name}.md").read_text().split())
    assert all(line in packed for line in lines), packed
    assert "**Not tuned, at the paper's rate:" in packed  # nobody has published a sweep of this base
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(command) == 0  # nothing is run again
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert all(r.status == "ok" for r in store.read_all(tmp_path))
    capsys.readouterr()
