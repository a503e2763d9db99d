"""Mistakes of the user: each gives exit code 2 and one clear line.

Nothing is written and nothing is lost.
"""

import gzip
import json
import sys

import pytest
import torch

import bench.runs.run
from bench.cli import engines
from bench.cli.parser import main
from bench.models.adapters import add_adapter
from bench.models.base import load, prepare
from bench.records import store
from tests import inter_folder
from tests.bench.base_types import make_base
from tests.bench.cli.helpers import refused
from tests.bench.records.test_store import make


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--method", "mola"], "unknown method 'mola'; did you mean 'molora'? There are lora, dora, asylora"),
        (["table2", "--methods", "lora,MALoRa"], "unknown method 'MALoRa'; did you mean 'malora'?"),
        (["run", "--mixture", "outer"], "unknown mixture 'outer'; did you mean 'inter'? There are intra, procedural"),
        (["run", "--mixture", "piqa"], "unknown mixture 'piqa'; did you mean 'intra/piqa'?"),
        (["run", "--mixture", "intra/arc_esay"], "did you mean 'intra/arc_easy'?"),
        (["run", "--profile", "huge"], "unknown profile 'huge'; there are tiny, small, paper"),
        (["table1", "--profile", "small2"], "unknown profile 'small2'; did you mean 'small'?"),
        (["run", "--track", "tensorbord"], "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        (["run", "--format", "essay"], "unknown format 'essay'; there are letters, cloze"),
        (["run", "--set", "backend=warp"], "malora: backend='warp' is unknown; choose one of 'auto', 'dense'"),
        (["run", "--set", "rank=3"], "malora: unknown option 'rank'; there are alpha_pattern, backend, beta"),
        (["run", "--set", "topk=3"], "malora: unknown option 'topk'; did you mean 'top_k'?"),
        (["run", "--set", "backend"], "'backend' is not NAME=VALUE"),
        (["run", "--set", "router_aux_loss_coef=0.1"], "router_aux_loss_coef has no effect in the benchmark"),
        (["run", "--method", "lora", "--set", "backend=dispatch"], "lora: unknown option 'backend'; there are "),
        (["table2", "--seeds", "0"], "'0' is not a whole number from 1"),
        (
            ["table2", "--together", "2", "--jobs", "2"],
            "in one process, and --jobs 2 in several; choose one of them",
        ),
        (["table2", "--engine", "rai"], "unknown engine 'rai'; did you mean 'ray'?"),
        (["table2", "--gpus-per-run", "0.5"], "--gpus-per-run is for --engine ray"),
        (["table2", "--gpus-per-run", "1.5"], "'1.5' must be a number from 0.01 to 1"),
        (["table2", "--engine", "ray", "--together", "2"], "--together 2 is for --engine local"),
        (["table2", "--storage", "file:///results"], "--storage is for --engine ray"),
        (["table2", "--engine", "ray", "--storage", "results"], "'results' is not a URL such as s3://bucket/results"),
        (["run", "--results", "s3://bucket/runs"], "'s3://bucket/runs' is a URL, and results need a folder"),
        (["run", "--learning-rate", "-1"], "must be a number above 0"),
        (["run", "--profile", "tiny", "--data", "."], "the tiny base model knows the words of generated tasks only"),
        (["run", "--profile", "small", "--data", "nowhere"], "nowhere is not a folder"),
        (["score", "--profile", "tiny", "--adapter", "nowhere"], "nowhere has no adapter_config.json"),
        (["list", "method"], "did you mean 'methods'? There are methods, tasks, mixtures, experiments"),
        (["export"], "has no folder runs"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [] if arguments[0] == "list" else ["--results", tmp_path / "results"]
    assert message in refused([*arguments, *options], capsys, tmp_path)


def test_ray_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(["table2", "--profile", "tiny", "--engine", "ray", "--results", tmp_path / "new"], capsys, tmp_path)
    assert error == "bench: --engine ray needs Ray: pip install --editable '.[ray]'."


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["table2", "--storage", "http://host/results"], "not of a kind in which a file can be created exclusively"),
        (["table2", "--storage", "memory://a/b", "--track", "tensorboard"], "leave out one of them"),
        (["fig2", "--storage", "memory://a/b"], "compare saved adapters"),
    ],
)
def test_storage_that_cannot_be_used(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "require_ray", lambda: None)
    options = ["--profile", "tiny", "--engine", "ray", "--results", tmp_path / "new"]
    assert message in refused([*arguments, *options], capsys, tmp_path)


def test_a_data_folder_with_a_missing_or_broken_file(base_folder, capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    command = ["run", "--profile", "small", "--model", base_folder, "--data", data, "--results", tmp_path / "results"]
    assert "piqa_train.jsonl.gz is missing" in refused(command, capsys, tmp_path)
    for split in ("train", "validation"):
        items = [{"goal": f"a{n}", "sol1": "b", "sol2": "c", "label": 0} for n in range(10)]
        lines = "\n".join(map(json.dumps, items))
        (data / f"piqa_{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
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
    assert "is not a complete causal language model" in refused(command, capsys, tmp_path)


def test_a_model_that_does_not_exist(capsys, tmp_path):
    command = ["run", "--profile", "tiny", "--model", "no/such-model", "--results", tmp_path / "results"]
    assert "'no/such-model' is no built-in (tiny, smollm2-135m)" in refused(command, capsys, tmp_path)


@pytest.mark.parametrize("kind", ["bert", "bloom"])
def test_a_model_that_does_not_keep_packed_examples_apart(kind, base_folder, capsys, tmp_path):
    """It would learn from the wrong context, and its scores would look like any other's."""
    folder, tokenizer = tmp_path / kind, load(prepare(str(base_folder)), torch.device("cpu"))[1]
    make_base(kind, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for method in ("lora", "malora"):
        command = ["run", "--profile", "tiny", "--model", folder, "--method", method, "--results", tmp_path / "r"]
        assert f"models of type '{kind}' cannot be used here" in refused(command, capsys, tmp_path)


def test_a_broken_adapter(base_folder, capsys, tmp_path):
    model, _ = load(prepare(str(base_folder)), torch.device("cpu"))
    add_adapter(model, "malora", {}, seed=0).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    command = ["score", "--profile", "tiny", "--model", base_folder, "--adapter", tmp_path / "adapter"]
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:100])
    assert "adapter_model.safetensors is broken" in refused(command, capsys, tmp_path)
    weights.write_bytes(intact)
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
    intact = config.read_text()
    config.write_text(json.dumps(json.loads(intact) | {"base_model_name_or_path": f"another@{'a' * 12}"}))
    assert "was trained on another@" in refused(good, capsys, tmp_path)
    # Adapters of other tools do not name their base, but the shapes do not fit.
    content = json.loads(intact) | {"base_model_name_or_path": "someone/else", "r": 3}
    config.write_text(json.dumps(content))
    assert "it was trained on another base" in refused(good, capsys, tmp_path)


def copy_record(path):
    path.with_name(f"{path.stem} (1).json").write_bytes(path.read_bytes())


def edit_score(path):
    path.write_text(path.read_text(encoding="utf-8").replace('"value": 0.5', '"value": 0.99'), encoding="utf-8")


@pytest.mark.parametrize("spoil, message", [(copy_record, "its file name is"), (edit_score, "its score of")])
@pytest.mark.parametrize("command", ["run", "table2", "export"])
def test_a_results_folder_with_a_copied_or_edited_record(command, spoil, message, capsys, tmp_path):
    spoil(store.write(make(), tmp_path / "results"))
    assert message in refused([command, "--results", tmp_path / "results"], capsys, tmp_path)


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
    assert "is not a complete record" in refused(command, capsys, tmp_path)
    assert "is not a complete record" in refused(
        ["publish", "--profile", "tiny", "--results", results], capsys, tmp_path
    )


def test_a_results_folder_that_is_a_file(base_folder, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for command in (["run"], ["table2", "--methods", "lora"]):
        command += ["--profile", "tiny", "--model", base_folder, "--results", tmp_path / "file" / "below"]
        assert "below cannot be a folder of records" in refused(command, capsys, tmp_path)
    assert "because it has no folder runs" in refused(["publish", "--results", tmp_path / "file"], capsys, tmp_path)
    assert "--trials is for runs" in refused(["publish", "--profile", "speed", "--trials"], capsys, tmp_path)
    assert "'' is not the name of a folder" in refused(["run", "--results", ""], capsys, tmp_path)


def test_what_cannot_work_is_found_before_training(base_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.runs.run, "train", lambda *a, **k: pytest.fail("trained"))
    (tmp_path / "file").touch()
    command = ["run", "--profile", "tiny", "--model", base_folder, "--results", tmp_path / "results"]
    for options, message in (
        (["--save", tmp_path / "file"], "file is a file; name a folder"),
        (["--save", tmp_path / "file" / "adapter"], f"is below {tmp_path / 'file'}, which is a file"),
        (["--save", tmp_path / ("a" * 256)], "at most 255 bytes"),
        (["--set", "inference_mode=true"], "malora with these options has nothing to train"),
        (["--set", "num_experts=1000000000"], "malora with r=3, num_experts=1000000000, d=8 needs at least "),
        (["--method", "lora", "--set", "r=10000000000"], "choose smaller ones"),
    ):
        assert message in refused([*command, *options], capsys, tmp_path)


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


def test_a_report_without_its_extra_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "itables", None)
    monkeypatch.delitem(sys.modules, "bench.report.html", raising=False)
    assert main(["report"]) == 2
    assert "the report needs itables" in capsys.readouterr().err
