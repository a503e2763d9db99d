"""The profiler: what it is asked for, the rows that stand for it, and the steps that it times."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.cli.parser import main
from bench.models.backbone import SHAPES, backbone
from bench.records import provenance, store
from bench.records.schema import SpeedRecord
from bench.speed import cli
from bench.speed import variants as bench_variants
from bench.speed.baselines import registered_baselines
from bench.speed.profiler import backbone_flops
from bench.speed.steps import DecodeStep, TrainStep, Workload
from bench.speed.subject import Subject
from bench.speed.variants import DEFAULT_BACKENDS, OURS, Variant, choose, variants
from malora.backbone.liger import LigerKernels
from malora.fused.availability import interprets_triton
from tests.bench.conftest import stand_in_for_liger

pytestmark = pytest.mark.usefixtures("short_rounds")
CPU = torch.device("cpu")
TOY = SHAPES["toy"]
needs_interpreter = pytest.mark.skipif(not interprets_triton(), reason="a GPU's Triton does not run on a CPU")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Also where there is a GPU, whose rows and defaults are others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(tmp_path, *arguments) -> SpeedRecord:
    assert cli.main([*map(str, arguments), "--results", str(tmp_path)]) == 0
    return store.read_speed(tmp_path)[-1]


def test_a_call_makes_a_record_a_table_and_a_figure(tmp_path, capsys):
    names = ["floor", "peft-lora", "malora-dense", "molora-loop"]
    made = run(tmp_path, "--variant", ",".join(names), "--rounds", 2, "--layers", 1)
    assert [row.name for row in made.rows] == names
    for row in made.rows:
        parts = row.seconds
        assert len(parts["step"]) >= 2 and set(parts) == {"forward", "backward", "optimizer", "step"}
        assert parts["step"][0] == pytest.approx(sum(parts[part][0] for part in ("forward", "backward", "optimizer")))
    assert made.peak_rates["before"].matrix_flops_per_second > 0 and not made.complete
    page = (tmp_path / "table10.md").read_text()
    assert "These are a CPU's figures" in page and "cut to 1 layers" in page
    assert "*14.687*" in page and "*1.07*" in page  # the paper's MALoRA, and what it is of its LoRA
    assert ">malora-dense</text>" in (tmp_path / "figure4c.svg").read_text()
    assert str(tmp_path) in capsys.readouterr().out
    assert main(["publish", "--profile", "speed", "--results", str(tmp_path)]) == 0
    assert f"{made.id} was cut short" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_inference(mode, tmp_path, capsys):
    made = run(tmp_path, "--variant", "peft-lora,malora-dense", "--rounds", 1, "--layers", 1, "--mode", mode)
    assert all(row.status == "ok" for row in made.rows)
    assert f"## toy, {mode}" in capsys.readouterr().out


def test_a_sweep_has_a_row_a_value_and_backend(tmp_path, capsys):
    arguments = ("--variant", "molora,malora", "--sweep", "top-k", "--tokens", 16, "--rounds", 1)
    made = run(tmp_path, *arguments)
    assert len(made.rows) == 4 * 2 * len({*DEFAULT_BACKENDS, "sorted"} - {"fused"})
    assert {row.status for row in made.rows} == {"ok"} and "| top-k |" in capsys.readouterr().out.replace("  ", "")


def test_ligers_functions_are_there_only_while_its_row_runs(monkeypatch):
    from transformers.models.llama import modeling_llama

    original, fused = modeling_llama.rotate_half, object()

    def apply(model, **_):
        modeling_llama.rotate_half = fused
        modeling_llama.__builtins_dict___0 = {}  # torch.compile leaves such names

    stand_in_for_liger(monkeypatch, apply)
    monkeypatch.setattr(bench_variants, "has_liger", lambda: True)
    monkeypatch.setattr(modeling_llama, "__builtins_dict___0", None, raising=False)  # so that it is gone in the end
    del modeling_llama.__builtins_dict___0
    subject = Subject(variants()["floor-liger"], backbone(TOY, 1, CPU), "prefill", 0.0)
    assert modeling_llama.rotate_half is original
    subject.load()
    assert modeling_llama.rotate_half is fused
    subject.park()
    assert modeling_llama.rotate_half is original


@pytest.mark.parametrize("out_of_the_box", [False, True])
def test_norms_are_torchs_own_where_liger_is_ours(out_of_the_box, monkeypatch):
    model = backbone(TOY, 1, CPU).float()
    norm, x = model.model.norm, torch.randn(3, 5, model.config.hidden_size)
    expected = norm(x)

    def apply(model, **_):
        norm.casting_mode, norm.forward = "llama", torch.relu

    stand_in_for_liger(monkeypatch, apply)
    LigerKernels(model.bfloat16(), out_of_the_box)
    if out_of_the_box:
        assert norm.forward is torch.relu
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x.bfloat16())
        assert y.dtype == torch.bfloat16 and (y - expected).norm() < 4e-3 * expected.norm()


def test_all_variants_share_one_set_of_frozen_weights():
    base = backbone(TOY, 1, CPU)
    before = {name: p.clone() for name, p in base.named_parameters()}
    with registered_baselines():
        rows = variants()
        for name in ("floor", "peft-lora", "peft-dora", "malora-dense", "asylora-dense-compiled", "molora-loop"):
            subject = Subject(replace(rows[name], run="eager"), base, "train", 0.05)
            shared = {id(p) for p in base.parameters()}
            assert shared <= {id(p) for p in subject.model.parameters()}, name
            assert all(p.any() and not p.is_meta for p in subject.own), name
            subject.load()
            ids = torch.randint(0, 512, (2, 8))
            subject.model(input_ids=ids, labels=ids).loss.backward()
            assert all((p.grad is not None) == p.requires_grad for p in subject.model.parameters()), name
            subject.park()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_decoding_over_a_static_cache_makes_the_tokens_of_generate():
    work = Workload("decode", batch=2, length=5, tokens=6, dropout=0.0, vocab_size=512)
    eager = Variant("malora-dense", "malora", "dense")
    subject = Subject(eager, backbone(TOY, None, CPU), "decode", 0.0)
    expected = DecodeStep(subject, work, 2)(lambda part: None)
    subject.variant = replace(eager, run="static")  # what a captured row does, without the graph
    step = DecodeStep(subject, work, 2)
    for _ in range(2):  # a second generation starts anew
        assert torch.equal(step(lambda part: None), expected) and expected.shape == (2, 6)


class FakeGraph:
    """What is replayed writes its gradients where those of the capture stand."""

    def __init__(self, run, passes):
        run()
        self.run, self.parameters = run, run.__self__.parameters
        self.static = [p.grad for p in self.parameters]

    def replay(self):
        self.run()
        for static, p in zip(self.static, self.parameters, strict=True):
            static.copy_(p.grad)


@pytest.mark.parametrize(
    "tokens, backend", [(8, "dense"), (24, "dense"), pytest.param(24, "fused", marks=needs_interpreter)]
)
def test_a_captured_step_trains_on_all_micro_batches(tokens, backend, monkeypatch):
    monkeypatch.setattr("bench.speed.steps.capture", FakeGraph)
    monkeypatch.setattr("bench.speed.steps.warm_up", lambda run: run())
    monkeypatch.setattr("bench.speed.steps.capture_refresh", lambda weights: weights.refresh() or weights.refresh)
    work = Workload("train", batch=2, length=4, tokens=tokens, dropout=0.0, vocab_size=512)
    eager = Variant("malora", "malora", backend)
    trained = []
    for run in ("eager", "captured"):
        subject = Subject(eager, backbone(TOY, 1, CPU), "train", 0.0)
        subject.variant = replace(eager, run=run)
        step = TrainStep(subject, work, 2)
        for _ in range(3):
            step(lambda part: None)
        assert bool(run == "captured" and backend == "fused") is bool(run == "captured" and step.weights)
        trained.append([p.detach() for p in step.parameters])
    for plain, replayed in zip(*trained, strict=True):
        torch.testing.assert_close(plain, replayed)


def test_the_backbone_s_operations():
    """Written out for one layer of the toy: q, k, v, o of 128 × 128, three of the MLP of 128 × 256, a head of 512."""
    base = backbone(TOY, 1, CPU)
    linear, attention = 2 * (4 * 128 * 128 + 3 * 128 * 256 + 128 * 512), 2 * 64 * 128
    work = Workload("train", batch=4, length=64, tokens=256, dropout=0.0, vocab_size=512)
    assert backbone_flops(base, work) == 256 * (2 * linear + 3 * attention)
    assert backbone_flops(base, replace(work, mode="prefill")) == 256 * (linear + attention)
    assert backbone_flops(base, replace(work, mode="decode")) is None


def test_names_stand_for_rows():
    names = [v.name for v in choose(["malora"], "train", torch.device("cuda"))]
    assert {"floor", "floor-captured", "peft-lora", "malora-dense-compiled"} < set(
        names
    ) and "molora-dense" not in names
    assert "malora-dense-compiled" not in [v.name for v in choose(["malora"], "decode", torch.device("cuda"))]
    assert {v.run for v in choose(["all"], "train", CPU)} == {"eager"}
    assert [v.name for v in choose(["floor-compiled"], "train", CPU)] == ["floor-compiled"]
    assert [name for name in variants() if "fp8" in name] == ["lora-fp8-liger-captured", "malora-fp8-liger-captured"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variant", "mola"], "unknown variant 'mola'; there are all, lora, asylora"),
        (["--variant", "malora-dense-captured"], "malora-dense-captured needs a GPU"),
        (["--variant", "malora-fused"], "malora-fused needs a GPU"),
        (["--shape", "llama3"], "unknown shape 'llama3'; there are llama2-7b, smollm2-135m, toy"),
        (["--mode", "serve"], "unknown mode 'serve'; there are train, prefill, decode"),
        (["--sweep", "depth"], "unknown sweep 'depth'; there are experts, rank, tokens, top-k"),
        (["--sweep", "rank", "--mode", "decode"], "leave --mode decode out"),
        (["--sweep", "rank", "--variant", "peft-lora"], "--sweep takes mixtures of ours, molora"),
        (["--tokens", "100"], "--tokens 100 is no multiple of --batch 4 × --length 64"),
        (["--mode", "prefill", "--tokens", "7"], "leave --tokens 7 out"),
        (["--sweep", "rank", "--layers", "1"], "--sweep rank of one linear map has no use for --layers"),
        (["--sweep", "tokens", "--tokens", "64"], "--sweep tokens of one linear map has no use for --tokens"),
        (["--layers", "3"], "--layers 3 cuts nothing: toy has 2 layers"),
        (["--length", "1"], "--length 1 leaves no next token to train on"),
        (["--rounds", "0"], "'0' is not a whole number from 1"),
        (["--rounds", "²"], "'²' is not a whole number from 1"),
        (["--dropout", "1"], "'1' is not a number from 0 to below 1"),
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
def test_a_file_where_the_results_should_go_is_found_before_the_measurement(below, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "measure", None)
    (tmp_path / "file").write_text("mine")
    assert cli.main(["--results", f"{tmp_path}/file{below}"]) == 2
    assert f"{tmp_path}/file{below} cannot be a folder of records" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--results", ""])
    assert "'' names no folder" in capsys.readouterr().err


@pytest.mark.parametrize("method", OURS)
def test_every_method_has_a_row_on_a_cpu(method):
    assert f"{method}-dense" in [v.name for v in choose([method], "train", CPU)]


def test_every_option_has_a_help_line_and_a_default():
    for action in cli._parser()._actions:
        assert action.help and not action.required, action.option_strings
        assert action.default is not None or "default" in action.help or action.dest in ("sweep", "layers")
    assert isinstance(cli._parser(), argparse.ArgumentParser)


def test_a_broken_record_is_found_before_the_measurement(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "broken.json").write_text(json.dumps({"schema": 1})[:-3])
    assert cli.main(["--results", str(tmp_path)]) == 2
    assert "broken.json is not a whole record of speed" in capsys.readouterr().err


def test_it_needs_nothing_of_the_harness_that_scores():
    code = "import sys; sys.modules.update(dict.fromkeys(('datasets', 'lm_eval', 'evaluate'))); import bench.speed"
    assert subprocess.run([sys.executable, "-c", code], cwd=provenance.ROOT, timeout=120).returncode == 0
