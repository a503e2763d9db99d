"""What a user does wrong is one clear line, exit code 2, nothing written and nothing lost."""

import argparse
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cli.commands import make_setting_from
from bench.cli.parser import main, make_parser
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import EXPERIMENTS
from bench.models.adapters import add_adapter
from bench.models.base import load, prepare
from bench.records import provenance, store
from bench.report.scores.selection import records_frame, records_of, records_that_lend_rates
from bench.runs.setting import make_run_config
from tests import inter_folder
from tests.bench.records.test_store import make

RATES = len(PROFILES["tiny"].rates)


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(arguments: list, capsys, tmp_path) -> str:
    """Runs the command, which must be refused; its message."""
    before = snapshot(tmp_path)
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as exit:  # argparse's own way out
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert snapshot(tmp_path) == before
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--method", "mola"], "unknown method 'mola'; there are lora, dora, asylora"),
        (["table2", "--methods", "lora,mola"], "unknown method 'mola'"),
        (["run", "--mixture", "outer"], "unknown mixture 'outer'; there are intra, procedural"),
        (["run", "--profile", "huge"], "unknown profile 'huge'; there are tiny, small, paper"),
        (["run", "--format", "essay"], "unknown format 'essay'; there are letters, cloze"),
        (["run", "--set", "backend=warp"], "malora: backend='warp' is unknown; choose one of 'auto', 'dense'"),
        (["run", "--set", "rank=3"], "malora has no option rank; there are backend, beta, d, down"),
        (["run", "--set", "backend"], "'backend' is not NAME=VALUE"),
        (["run", "--method", "lora", "--set", "backend=dispatch"], "lora has no option backend; there are "),
        (["table2", "--seeds", "0"], "'0' is not a whole number from 1"),
        (["run", "--learning-rate", "-1"], "must be a number above 0"),
        (["run", "--profile", "tiny", "--data", "."], "the tiny base knows the words of the procedural tasks only"),
        (["run", "--profile", "small", "--data", "nowhere"], "nowhere is not a folder"),
        (["score", "--profile", "tiny", "--adapter", "nowhere"], "nowhere has no adapter_config.json"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [] if arguments[0] == "fly" else ["--results", tmp_path / "results"]
    assert message in refused([*arguments, *options], capsys, tmp_path)


def test_a_data_folder_that_lacks_a_file_or_holds_a_broken_one(base_folder, capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    command = ["run", "--profile", "small", "--model", base_folder, "--data", data, "--results", tmp_path / "results"]
    assert "piqa_train.jsonl.gz is missing" in refused(command, capsys, tmp_path)
    for split in ("train", "validation"):
        item = {"goal": "a", "sol1": "b", "sol2": "c", "label": 0}
        (data / f"piqa_{split}.jsonl.gz").write_bytes(gzip.compress(json.dumps(item).encode()))
    (data / "openbookqa_train.jsonl.gz").write_bytes(b"not gzip")
    assert "openbookqa_train.jsonl.gz is broken" in refused(command, capsys, tmp_path)


def test_a_model_folder_without_weights(base_folder, capsys, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    command = ["run", "--profile", "tiny", "--model", model, "--results", tmp_path / "results"]
    assert "has no weights (*.safetensors)" in refused(command, capsys, tmp_path)
    (model / "model.safetensors").write_bytes((base_folder / "model.safetensors").read_bytes()[:500])
    (model / "tokenizer.json").write_bytes((base_folder / "tokenizer.json").read_bytes())
    assert "does not hold a whole causal language model" in refused(command, capsys, tmp_path)


def test_a_model_that_is_nowhere(capsys, tmp_path):
    command = ["run", "--profile", "tiny", "--model", "no/such-model", "--results", tmp_path / "results"]
    assert "'no/such-model' is no built-in (tiny, smollm2-135m)" in refused(command, capsys, tmp_path)


def test_an_adapter_that_is_broken(base_folder, capsys, tmp_path):
    model, _ = load(prepare(str(base_folder)), torch.device("cpu"))
    add_adapter(model, "malora", {}, seed=0).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    command = ["score", "--profile", "tiny", "--model", base_folder, "--adapter", tmp_path / "adapter"]
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert "adapter_model.safetensors is broken" in refused(command, capsys, tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "is not a PEFT config" in refused(command, capsys, tmp_path)


@pytest.mark.parametrize("method", ["lora", "malora"])
def test_an_adapter_trained_on_another_base(method, base_folder, capsys, tmp_path):
    model, _ = load(prepare(str(base_folder)), torch.device("cpu"))
    add_adapter(model, method, {}, seed=0).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    good = ["score", "--profile", "tiny", "--model", base_folder, "--adapter", tmp_path / "adapter", "--max-items", 2]
    assert main([str(a) for a in good]) == 0
    assert "lexicon" in capsys.readouterr().out
    config = tmp_path / "adapter" / "adapter_config.json"
    whole = config.read_text()
    config.write_text(whole.replace("random-llama@", "another@"))
    assert "was trained on another@" in refused(good, capsys, tmp_path)
    # One that does not say, from another tool: its shapes tell.
    content = json.loads(whole) | {"base_model_name_or_path": "someone/else", "r": 3}
    config.write_text(json.dumps(content))
    assert "it was trained on another base" in refused(good, capsys, tmp_path)


def test_a_results_folder_with_a_truncated_record(base_folder, capsys, tmp_path):
    results = tmp_path / "results"
    path = store.write(make(), results)
    path.write_text(path.read_text()[:300])
    command = [
        *"table2 --profile tiny --model".split(),
        base_folder,
        *"--methods lora --seeds 1 --max-steps 1 --max-items 1 --jobs 1 --results".split(),
        results,
    ]
    assert "is not a whole record" in refused(command, capsys, tmp_path)
    assert "is not a whole record" in refused(["publish", "--profile", "tiny", "--results", results], capsys, tmp_path)


def test_a_results_folder_that_is_a_file(base_folder, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for command in (["run"], ["table2", "--methods", "lora"]):
        command += ["--profile", "tiny", "--model", base_folder, "--results", tmp_path / "file" / "below"]
        assert "below cannot be a folder of records" in refused(command, capsys, tmp_path)
    assert "it has no folder runs" in refused(["publish", "--results", tmp_path / "file"], capsys, tmp_path)
    assert "'' names no folder" in refused(["run", "--results", ""], capsys, tmp_path)


def test_table2_runs_sweeps_and_resumes(base_folder, tmp_path, capsys):
    """The whole path from the command line to a table, in miniature, with two worker processes."""
    command = [
        *"table2 --profile tiny --model".split(),
        base_folder,
        *"--methods lora,malora --seeds 1 --sweep --max-steps 2 --max-items 3 --jobs 2 --results".split(),
        tmp_path,
    ]
    assert main([str(a) for a in command]) == 0
    page = (tmp_path / "table2.md").read_text()
    assert "were cut short" in page and "| MALoRA " in page and "What each rate gave" in page
    before = snapshot(tmp_path)
    assert len(before) == 2 * (2 * RATES + 1) + 1  # of two methods and the base, a record and its items; the page
    assert main([str(a) for a in command]) == 0
    assert snapshot(tmp_path) == before
    capsys.readouterr()


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
    assert "an adapter is kept only while its run is made" in refused(command, capsys, tmp_path)


def test_humaneval_without_bubblewrap_is_refused_before_any_work(base_folder, capsys, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    inter_folder.make(data)
    command = [
        *"run --profile small --mixture inter-open/code --method lora --max-steps 1 --max-items 1 --model".split(),
        *(base_folder, "--data", data, "--results", tmp_path / "results"),
    ]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it (apt install bubblewrap), or run what models write unsafely" in refused(
        command, capsys, tmp_path
    )
    assert main([str(a) for a in [*command, "--unsafe-code"]]) == 0
    assert "pass@1, 1 items" in capsys.readouterr().out


def test_the_inter_domain_path_in_miniature(base_folder, capsys, tmp_path):
    """Training on long labels, likelihoods for validation, generation for the test."""
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


def test_every_option_has_a_help_line_and_a_default():
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert set(commands) == {*EXPERIMENTS, "run", "score", "leaderboard", "report", "publish"}
    for name, command in commands.items():
        for action in command._actions:
            assert action.help, (name, action.option_strings)
            assert not action.required or action.dest == "adapter"


def test_leaderboard_check_changes_nothing(capsys):
    before = snapshot(store.RESULTS)
    main(["leaderboard", "--check"])
    assert snapshot(store.RESULTS) == before


def launch(*arguments) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m", "bench"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=provenance.ROOT)
    assert done.returncode == 0, done.stderr


def test_two_processes_train_together(base_folder, tmp_path):
    """What the paper profile does on several GPUs: each process takes half of every batch, one writes the record."""
    command = [
        *"run --profile tiny --model".split(),
        base_folder,
        *"--method malora --max-steps 12 --max-items 2".split(),
    ]
    launch(*command, "--results", tmp_path / "two")
    (two,) = store.read_all(tmp_path / "two")
    assert two.status == "ok" and two.train.steps == 12
    assert main([str(a) for a in [*command, "--results", tmp_path / "one"]]) == 0
    (one,) = store.read_all(tmp_path / "one")
    # Dropout and the balance loss see other tokens together, so the curves are near and not equal.
    assert two.train.curve[0].loss == pytest.approx(one.train.curve[0].loss, rel=0.02)
    assert two.config == one.config


def test_two_processes_make_a_table_together(base_folder, tmp_path):
    """Both must choose the same rates, though only one of them scores."""
    launch(
        "table2",
        "--profile",
        "tiny",
        "--model",
        base_folder,
        "--methods",
        "lora",
        "--seeds",
        1,
        "--sweep",
        "--max-steps",
        1,
        "--max-items",
        2,
        "--results",
        tmp_path,
    )
    assert len(store.read_all(tmp_path)) == RATES + 1  # and the base
    assert "| LoRA " in (tmp_path / "table2.md").read_text()


def test_a_report_without_its_extra_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "itables", None)
    monkeypatch.delitem(sys.modules, "bench.report.html", raising=False)
    assert main(["report"]) == 2
    assert "the report needs itables" in capsys.readouterr().err


def test_a_profile_says_how_questions_are_put_unless_the_user_does(monkeypatch):
    tiny = PROFILES["tiny"]
    monkeypatch.setitem(PROFILES, "tiny", replace(tiny, inter=tiny.inter | {"format": "cloze"}))

    def chosen(*arguments):
        options = make_parser().parse_args([*arguments, "--profile", "tiny"])
        return make_setting_from(options, options.experiment.mixture).profile.format

    assert chosen("table1") == "cloze" and chosen("table2") == "letters"
    assert chosen("table1", "--format", "letters") == "letters" and chosen("table2", "--format", "cloze") == "cloze"


def test_tasks_lend_domains_their_rates_whatever_the_format(setting):
    """Unless tasks were tuned in the domains' own."""

    def run(**changes):
        one = make(0)
        one.config = make_run_config(setting, "malora", 0).replace(**changes)
        return one

    like = run(mixture="inter-open", format="cloze").config
    lent, own = run(mixture="intra", learning_rate=1e-3), run(mixture="intra", format="cloze")
    of_domains, other = run(mixture="inter-open"), run(mixture="intra", max_length=7)
    assert records_of(records_that_lend_rates(records_frame([lent, of_domains, other]), like)) == [lent]
    assert records_of(records_that_lend_rates(records_frame([lent, of_domains, own, other]), like)) == [own]
    assert records_of(records_that_lend_rates(records_frame([lent, own]), lent.config)) == [lent]
