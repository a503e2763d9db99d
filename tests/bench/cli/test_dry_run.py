"""`--dry-run` lists the missing runs, and every command says before it starts how long it takes."""

import pytest
import torch

from bench.cli.parser import main
from bench.records import store
from bench.records.provenance import device_name
from bench.runs import pool
from bench.runtime import progress
from tests.bench.cli.helpers import snapshot

TABLE = "table2 --profile tiny --methods lora,malora --seeds 1 --max-steps 2 --max-items 2 --jobs 1".split()


@pytest.fixture
def bench(base_folder, tmp_path, capsys):
    """Run a command on the random base; returns its outputs."""

    def call(*arguments):
        assert main([*map(str, arguments), "--model", str(base_folder), "--results", str(tmp_path / "results")]) == 0
        return capsys.readouterr()

    return call


def test_a_dry_run_lists_the_missing_runs_and_writes_nothing(bench, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(pool, "run", lambda *a, **k: pytest.fail("made a run"))
        out = bench(*TABLE, "--dry-run").out
    assert snapshot(tmp_path) == {} and not (tmp_path / "results").exists()
    lines = out.splitlines()
    assert lines[0].split() == ["run", "about", "from"]
    assert lines[-1].startswith("table2: 3 of 3 runs to make, about ")
    listed = {line.split()[0] for line in lines[2:-1]}

    made = bench(*TABLE)
    assert made.err.splitlines()[0] == lines[-1]  # before the first run
    assert {record.id for record in store.read_all(tmp_path / "results")} == listed
    before = snapshot(tmp_path)
    assert bench(*TABLE, "--dry-run").out == "table2: 0 of 3 runs to make.\n"
    assert bench(*TABLE, "--seeds", 2, "--dry-run").out.splitlines()[-1].startswith("table2: 2 of 5 runs to make")
    assert snapshot(tmp_path) == before


def test_a_sweep_that_is_recorded_decides_the_rates_of_a_dry_run(bench, tmp_path):
    sweep = [*TABLE[:4], "lora", *TABLE[5:], "--sweep"]
    planned = bench(*sweep, "--dry-run").out.splitlines()[-1]
    assert planned.startswith("table2: 7 of 7 runs to make")  # six rates and the base; the table's runs are among them
    bench(*sweep)
    assert bench(*sweep, "--dry-run").out == "table2: 0 of 7 runs to make.\n"


def test_a_single_run_and_a_figure(bench, tmp_path):
    run = ["run", "--profile", "tiny", "--method", "malora", "--max-steps", 2, "--max-items", 2]
    out = bench(*run, "--dry-run").out
    assert "run: 1 of 1 runs to make, about " in out and "malora-lr0.0004-s0-" in out
    assert not (tmp_path / "results").exists()
    assert bench("fig2", "--profile", "tiny", "--dry-run").out.splitlines()[-1].startswith("fig2: ")
    assert not (tmp_path / "results").exists()
    assert bench(*run).err.splitlines()[0] == out.splitlines()[-1]
    assert bench(*run, "--dry-run").out == "run: 0 of 1 runs to make.\n"


def test_scoring_says_how_long_it_takes_and_how_far_it_is(bench, tmp_path, monkeypatch):
    adapter, cut = tmp_path / "adapter", ["--profile", "tiny", "--max-steps", 2, "--max-items", 3]
    bench("run", "--method", "lora", *cut, "--save", adapter)
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    command = ["score", "--adapter", adapter, *cut]
    first, *lines = bench(*command, "--record").err.splitlines()
    assert first.startswith("score: 15 items of 5 tasks, about ")
    assert first.endswith(f" s (median of 1 record of other methods on {device_name(torch.device('cpu'))}, cut short).")
    assert lines and all(f"elsewhere-{adapter.name}-" in line and ": answer " in line for line in lines)
    assert bench(*command, "--record").err == ""  # the record is found
    assert bench(*command).err.splitlines()[0].startswith("score: 15 items")
