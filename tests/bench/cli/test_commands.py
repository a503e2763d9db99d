"""Commands from their arguments to their output, in miniature."""

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch

from bench.cli.commands import make_setting_from
from bench.cli.parser import main, make_parser
from bench.experiments.profiles import PROFILES
from bench.records import provenance, store
from bench.runs import pool
from tests.bench import launch
from tests.bench.cli.helpers import refused, snapshot
from tests.bench.event_files import check_events

RATES = len(PROFILES["tiny"].rates)


def test_table2_runs_sweeps_and_resumes(base_folder, tmp_path, capsys, monkeypatch):
    """From the command line to a table and to event files, with two worker processes."""
    rates = PROFILES["tiny"].rates[:3]
    monkeypatch.setitem(PROFILES, "tiny", replace(PROFILES["tiny"], rates=rates))
    if not torch.cuda.is_available():
        monkeypatch.setattr(pool, "START_METHOD", "fork")  # a new Python takes seconds to import everything
    is_tracked = importlib.util.find_spec("tensorboard") is not None
    command = [
        *"table2 --profile tiny --model".split(),
        base_folder,
        *"--methods lora,malora --seeds 1 --sweep --max-steps 2 --max-items 3 --jobs 2 --results".split(),
        tmp_path,
        *(["--track", "tensorboard"] if is_tracked else []),
    ]
    assert main([str(a) for a in command]) == 0
    page = (tmp_path / "table2.md").read_text()
    assert "were cut short" in page and "| MALoRA " in page and "Scores by learning rate" in page
    before = snapshot(tmp_path)
    # One record and its items per run of two methods and of the base, and the page.
    assert len([path for path in before if tmp_path / "tracking" not in path.parents]) == 2 * (2 * len(rates) + 1) + 1
    if is_tracked:  # each run in a folder of its own
        for record in store.read_all(tmp_path):
            check_events(tmp_path, record)
    assert main([str(a) for a in command]) == 0
    assert snapshot(tmp_path) == before
    capsys.readouterr()


def test_the_runs_of_a_table_train_together(base_folder, tmp_path, capsys):
    options = ["--profile", "tiny", "--model", base_folder, "--max-steps", 3, "--max-items", 2, "--results", tmp_path]
    command = ["table2", "--methods", "lora,malora", "--seeds", 1, "--together", 4, *options]
    assert main([str(a) for a in command]) == 0
    found = {one.config.method: one.provenance.trained_together for one in store.read_all(tmp_path)}
    assert found == {"base": None, "lora": 2, "malora": 2}
    assert "MALoRA" in capsys.readouterr().out


def test_run_prints_and_records(base_folder, tmp_path, capsys):
    command = [
        *"run --profile tiny --model".split(),
        base_folder,
        *"--method malora --max-steps 2 --max-items 3 --set backend=dispatch --save".split(),
        tmp_path / "adapter",
        "--results",
        tmp_path,
    ]
    assert main([str(a) for a in command]) == 0
    out = capsys.readouterr().out
    (path,) = (tmp_path / "runs").glob("*.json")
    assert "lexicon" in out and str(path) in out
    assert json.loads(path.read_text())["config"]["method_options"]["backend"] == "dispatch"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "an adapter can be saved only by the run that trains it" in refused(command, capsys, tmp_path)


def test_run_on_domains(base_folder, capsys, tmp_path):
    """Train on long labels, validate by likelihood, and generate the test's answers."""
    command = [
        *"run --profile tiny --mixture inter --method malora --max-steps 12 --max-items 3 --model".split(),
        *(base_folder, "--results", tmp_path),
    ]
    assert main([str(a) for a in command]) == 0
    out = capsys.readouterr().out
    assert "(exact_match, 3 items)" in out and "(rougeL, 3 items)" in out and "(acc, 3 items)" in out
    (one,) = store.read_all(tmp_path)
    assert one.config.learning_rate == 5e-4  # the paper's for domains
    assert {score.metric for score in one.validation.values()} == {"likelihood"}
    assert all(0 < score.value < 1 for score in one.validation.values())
    assert one.train.curve[-1].loss < one.train.curve[0].loss


def test_leaderboard_check_changes_nothing(capsys, tmp_path, monkeypatch):
    """With pages that are there and differ, and pages that are missing."""
    shutil.copytree(store.RESULTS / "tiny", tmp_path / "results" / "tiny")
    shutil.copy(provenance.ROOT / "README.md", tmp_path)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results")
    (page, *_) = (tmp_path / "results" / "tiny").glob("*.md")
    page.write_text("Old\n")
    before = snapshot(tmp_path)
    assert main(["leaderboard", "--check"]) == 1
    assert snapshot(tmp_path) == before and page.name in "".join(capsys.readouterr())


def test_two_processes_train_together(base_folder, tmp_path):
    """Train in two processes, as the paper profile does on several GPUs.

    Each process takes a part of every batch, and one writes the record. Without dropout the curves are those of one
    process.
    """
    command = [
        *"run --profile tiny --model".split(),
        base_folder,
        *"--method malora --set lora_dropout=0.0 --max-steps 12 --max-items 2".split(),
    ]
    done = launch.run_bench(
        *command,
        "--results",
        tmp_path / "two",
        "--save",
        tmp_path / "adapter",
        as_a_user=True,  # by torchrun
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recorded in") == 1
    (two,) = store.read_all(tmp_path / "two")
    assert two.status == "ok" and two.train.steps == 12
    assert main([str(a) for a in [*command, "--results", tmp_path / "one"]]) == 0
    (one,) = store.read_all(tmp_path / "one")
    for got, point in zip(two.train.curve, one.train.curve, strict=True):
        assert vars(got) == pytest.approx(vars(point), rel=1e-3)
    assert two.config == one.config and two.train.tokens == one.train.tokens

    done = launch.run_bench(
        *"score --profile tiny --max-items 2 --model".split(), base_folder, "--adapter", tmp_path / "adapter"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lexicon") == 1  # the first process scores


def test_two_processes_make_a_table_together(base_folder, tmp_path):
    """Check that both processes choose the same learning rates.

    Only one of them scores.
    """
    options = "--profile tiny --methods lora --seeds 1 --sweep --max-steps 1 --max-items 2".split()
    done = launch.run_bench("table2", *options, "--model", base_folder, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(store.read_all(tmp_path)) == RATES + 1  # and the base
    assert "| LoRA " in (tmp_path / "table2.md").read_text()


def test_processes_that_are_not_connected_are_refused(base_folder, tmp_path, capsys, monkeypatch):
    """Otherwise each would make the whole run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    base = ("--profile", "tiny", "--model", base_folder)
    for command in (("run", *base), ("table2", *base), ("score", *base, "--adapter", tmp_path)):
        message = refused(
            [*command, "--results", tmp_path / "r"] if command[0] != "score" else command, capsys, tmp_path
        )
        assert "WORLD_SIZE is 2" in message


def test_the_profile_chooses_the_prompt_format_unless_the_user_does(monkeypatch):
    tiny = PROFILES["tiny"]
    monkeypatch.setitem(PROFILES, "tiny", replace(tiny, inter=tiny.inter | {"format": "cloze"}))

    def chosen(*arguments):
        options = make_parser().parse_args([*arguments, "--profile", "tiny"])
        return make_setting_from(options, options.experiment.mixture).profile.format

    assert chosen("table1") == "cloze" and chosen("table2") == "letters"
    assert chosen("table1", "--format", "letters") == "letters" and chosen("table2", "--format", "cloze") == "cloze"
