"""The command line: a call measures, and writes a record and its pages.

It rejects what it would ignore.
"""

import json

import pytest

from bench.cli.parser import main
from bench.records import store
from bench.records.speed_schema import SpeedRecord
from bench.speed import cli
from bench.speed.variants import DEFAULT_BACKENDS


def run(tmp_path, *arguments) -> SpeedRecord:
    assert cli.main([*map(str, arguments), "--results", str(tmp_path)]) == 0
    return store.read_speed(tmp_path)[-1]


def test_a_call_writes_a_record_a_table_and_a_figure(tmp_path, capsys):
    names = ["floor", "peft-lora", "malora-dense", "molora-loop"]
    record = run(tmp_path, "--variant", ",".join(names), "--rounds", 2, "--layers", 1)
    assert [row.name for row in record.rows] == names
    for row in record.rows:
        seconds = row.seconds
        assert len(seconds["step"]) >= 2 and set(seconds) == {"forward", "backward", "optimizer", "step"}
        phases = sum(seconds[phase][0] for phase in ("forward", "backward", "optimizer"))
        assert seconds["step"][0] == pytest.approx(phases)
    assert record.peak_rates["before"].matrix_flops_per_second > 0 and not record.complete
    page = (tmp_path / "table10.md").read_text()
    assert "Measured on a CPU" in page and "cut to 1 layers" in page
    assert "*14.687*" in page and "*1.07*" in page  # the paper's MALoRA step, and its ratio to the paper's LoRA
    assert ">malora-dense</text>" in (tmp_path / "figure4c.svg").read_text()
    assert str(tmp_path) in capsys.readouterr().out
    assert main(["publish", "--profile", "speed", "--results", str(tmp_path)]) == 0
    assert f"{record.id} was cut short" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_inference(mode, tmp_path, capsys):
    record = run(tmp_path, "--variant", "peft-lora,malora-dense", "--rounds", 1, "--layers", 1, "--mode", mode)
    assert all(row.status == "ok" for row in record.rows)
    assert f"## toy, {mode}" in capsys.readouterr().out


def test_a_sweep_has_a_row_per_value_method_and_backend(tmp_path, capsys):
    arguments = ("--variant", "molora,malora", "--sweep", "top-k", "--tokens", 16, "--rounds", 1)
    record = run(tmp_path, *arguments)
    assert len(record.rows) == 4 * 2 * len({*DEFAULT_BACKENDS, "sorted"} - {"fused"})
    assert {row.status for row in record.rows} == {"ok"} and "| top-k |" in capsys.readouterr().out.replace("  ", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variant", "mola"], "unknown variant 'mola'; did you mean 'molora'? There are all, lora, asylora"),
        (["--variant", "malora-dense-captured"], "malora-dense-captured needs a GPU"),
        (["--variant", "malora-fused"], "malora-fused needs a GPU"),
        (["--variant", "malora-dens"], "unknown variant 'malora-dens'; did you mean 'malora-dense'?"),
        (["--shape", "llama2"], "unknown shape 'llama2'; did you mean 'llama2-7b'? There are llama2-7b, llama2-13b"),
        (["--shape", "gpt"], "unknown shape 'gpt'; there are llama2-7b, llama2-13b, llama3-8b, llama3-70b"),
        (["--mode", "serve"], "unknown mode 'serve'; there are train, prefill, decode"),
        (["--sweep", "depth"], "unknown sweep 'depth'; there are experts, rank, tokens, top-k"),
        (["--sweep", "rank", "--mode", "decode"], "leave --mode decode out"),
        (
            ["--sweep", "rank", "--variant", "malora,mollora"],
            "--sweep measures routed methods: unknown one 'mollora'; did you mean 'molora'?",
        ),
        (
            ["--sweep", "rank", "--variant", "peft-lora"],
            "--sweep measures routed methods: unknown one 'peft-lora'; there are",
        ),
        (["--tokens", "100"], "--tokens 100 is no multiple of --batch 4 × --length 64"),
        (["--mode", "prefill", "--tokens", "7"], "leave --tokens 7 out"),
        (["--sweep", "rank", "--layers", "1"], "--sweep rank of one linear layer has no use for --layers"),
        (["--sweep", "tokens", "--tokens", "64"], "--sweep tokens of one linear layer has no use for --tokens"),
        (["--layers", "3"], "--layers 3 is too many: toy has 2 layers"),
        (["--length", "1"], "--length 1 leaves no next token to train on"),
        (["--rounds", "0"], "'0' is not a whole number from 1"),
        (["--rounds", "²"], "'²' is not a whole number from 1"),
        (["--dropout", "1"], "'1' must be at least 0 and below 1"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path):
    try:
        code = cli.main([*arguments, "--results", str(tmp_path / "results")])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and message in error.strip().splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_in_place_of_the_results_folder_is_found_before_the_measurement(below, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "measure", None)
    (tmp_path / "file").write_text("mine")
    assert cli.main(["--results", f"{tmp_path}/file{below}"]) == 2
    assert f"{tmp_path}/file{below} cannot be a folder of records" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--results", ""])
    assert "'' is not the name of a folder" in capsys.readouterr().err


def test_a_broken_record_is_found_before_the_measurement(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "measure", None)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "broken.json").write_text(json.dumps({"schema": 1})[:-3])
    assert cli.main(["--results", str(tmp_path)]) == 2
    assert "broken.json is not a complete speed record" in capsys.readouterr().err


def test_every_option_has_a_help_line_and_a_default():
    for action in cli.make_parser()._actions:
        assert action.help and not action.required, action.option_strings
        assert action.default is not None or "default" in action.help or action.dest in ("sweep", "layers")
