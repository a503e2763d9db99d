"""Rows of other packages: a worker process with an environment of its own, in turns with the other rows.

A stand-in for Unsloth is installed in a folder, so the worker that runs is the real one.
"""

import pytest
import torch

from bench.errors import UserError
from bench.models.backbone import SHAPES
from bench.records import store
from bench.speed import cli
from bench.speed.loops.external import process
from bench.speed.loops.external.process import ExternalBaselines, ExternalRow, external_folder
from bench.speed.loops.rows import all_rows
from bench.speed.steps import Workload

STAND_IN = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

__version__ = "1.2"
print("a banner, which is no answer")


class FastLanguageModel:
    @staticmethod
    def from_pretrained(folder, dtype, **_):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), None

    @staticmethod
    def get_peft_model(model, r, lora_alpha, lora_dropout, bias, target_modules, use_gradient_checkpointing):
        if use_gradient_checkpointing:
            raise ValueError("not here")
        config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=target_modules)
        return get_peft_model(model, config)

    @staticmethod
    def for_training(model, use_gradient_checkpointing):
        model.train()
"""


@pytest.fixture
def environment(tmp_path):
    package = tmp_path / "baselines" / "unsloth"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    return package.parent


def test_a_worker_trains_the_same_model_and_is_kept_until_the_end(environment):
    work = Workload("train", batch=2, length=16, tokens=64, dropout=0.0, vocab_size=512)
    with ExternalBaselines(environment, SHAPES["toy"], 1, work, torch.device("cpu")) as external:
        row = ExternalRow(all_rows()["unsloth-lora"], external)
        with row.opened() as program:
            assert program.step() > 0 and program.peak_bytes() is None
            first = program.loss()
        with row.opened() as program:
            program.step()
            assert program.loss() == pytest.approx(first, abs=0.1) and first == pytest.approx(6.24, abs=0.1)  # log 512
        assert row.about["package"] == "unsloth 1.2" and row.worker is not None
        running = row.worker.process
        failing = ExternalRow(all_rows()["unsloth-lora-full"], external)
        with pytest.raises(RuntimeError, match="ValueError: not here"), failing.opened() as program:
            program.step()
    assert running.returncode == 0


def test_a_worker_that_ends_gives_its_last_words(environment, tmp_path):
    (environment / "unsloth" / "__init__.py").write_text("raise SystemExit('no GPU here')")
    worker = process.Worker(environment, str(tmp_path), torch.device("cpu"))
    try:
        with pytest.raises(RuntimeError, match="the worker ended: no GPU here"):
            worker.ask("step")
    finally:
        worker.close()


def test_a_folder_that_was_named_must_have_the_package(environment, tmp_path, monkeypatch):
    monkeypatch.delenv(process.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(process, "DEFAULT_FOLDER", tmp_path / "nothing")
    assert external_folder(environment) == environment and external_folder(None) is None
    monkeypatch.setenv(process.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match="has no package unsloth; `make baselines`"):
        external_folder(None)


def test_rows_without_their_environment_are_left_out_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(process.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(process, "DEFAULT_FOLDER", tmp_path / "nothing")
    arguments = ["--loop", "plain", "--layers", "1", "--rounds", "1", "--length", "16", "--tokens", "64"]
    assert cli.main([*arguments, "--variant", "unsloth-lora,floor", "--results", str(tmp_path)]) == 0
    assert [row.name for row in store.read_speed(tmp_path)[0].rows] == ["floor"]
    assert "unsloth-lora: not measured, because unsloth is not in .baselines" in capsys.readouterr().err
    assert cli.main([*arguments, "--variant", "unsloth-lora", "--results", str(tmp_path / "none")]) == 2
