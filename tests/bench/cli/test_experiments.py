"""Every experiment from its command to its page, in miniature."""

from dataclasses import replace

import pytest

from bench.cli.parser import main
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import EXPERIMENTS
from bench.records import store
from tests.bench.cli.helpers import snapshot
from tests.bench.conftest import SOURCE


def constant_score(model, tokenizer, examples, **options):
    """Replaces lm-eval, which takes a second per run and is tested elsewhere."""
    row = {"metric": "acc", "value": 0.5, "stderr": 0.5, "n": 2, "version": 2}
    return {task: dict(row) for task in examples}, {task: [0, 1] for task in examples}, None


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
def test_an_experiment_from_command_to_page(name, titles, lines, base_folder, tmp_path, capsys, monkeypatch):
    experiment = EXPERIMENTS[name]
    few = tuple(
        replace(entry, seeds=2 if name == "fig2" else 1) for entry in experiment.entries if entry.title in titles
    )
    monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, entries=few))
    monkeypatch.setitem(PROFILES, "tiny", replace(PROFILES["tiny"], source=SOURCE))
    if name != "table1":  # table1 generates answers and trains on single tasks
        monkeypatch.setattr("bench.runs.run.score", constant_score)
    if experiment.figure:
        monkeypatch.setattr(
            "bench.runs.plan.single_task_mixtures", lambda mixture: [f"{mixture}/lexicon", f"{mixture}/second"]
        )
    command = f"{name} --profile tiny --max-steps 1 --max-items 2 --jobs 1".split()
    command += ["--model", str(base_folder), "--results", str(tmp_path)]
    assert main(command) == 0
    packed = " ".join((tmp_path / f"{name}.md").read_text().split())
    assert all(line in packed for line in lines), packed
    assert "**Not tuned, at the paper's rate:" in packed  # no sweep of this base is published
    before = snapshot(tmp_path)
    assert main(command) == 0  # nothing is run again
    assert snapshot(tmp_path) == before
    assert all(r.status == "ok" for r in store.read_all(tmp_path))
    capsys.readouterr()
