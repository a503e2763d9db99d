"""One run from its configuration to its record, and records of failed runs."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch

import bench.runs.run
from bench.cli.parser import main
from bench.evaluate.answer_journal import AnswerJournal
from bench.experiments.methods import BASE
from bench.records import store
from bench.runs.pool import run_all
from bench.runs.run import checkpoint_of, run
from bench.runs.setting import make_run_config
from bench.train.step import TrainStep
from tests.bench.cli.helpers import snapshot
from tests.bench.conftest import make_setting
from tests.bench.train.test_checkpoint import KilledError

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("method", ["lora", "malora"])
def test_training_lowers_the_loss_and_records_what_it_did(method, setting):
    result = run(make_run_config(setting, method, seed=0, learning_rate=1e-2), setting)
    curve = [point.loss for point in result.train.curve]
    assert curve[-1] < curve[0] - 0.1
    examples = result.data.train.values()
    assert result.train.steps == -(-sum(task.examples for task in examples) // 8)
    assert result.train.tokens == sum(task.tokens for task in examples)
    assert set(result.train.seconds) == {"data", "forward_backward", "optimizer", "evaluation"}
    assert all(seconds > 0 for seconds in result.train.seconds.values())
    mean = result.train.training_seconds / result.train.steps
    assert mean / 4 < result.train.steady_step_seconds < 4 * mean and result.train.captures is None
    assert result.parameters.trainable > 0 and result.parameters.adapter_bytes == 4 * result.parameters.trainable


def test_the_base_is_scored_and_not_trained(setting):
    result = run(make_run_config(setting, BASE, 0), setting)
    assert result.train is None and result.validation is None and set(result.test) == set(result.items)


def test_max_steps_and_max_items_cut_a_run_short(base_folder, tmp_path):
    setting = make_setting(base_folder, tmp_path, max_steps=3, max_items=4)
    result = run(make_run_config(setting, "lora", seed=0), setting)
    assert result.train.steps == 3 and {len(v) for v in result.items.values()} == {4} and not result.complete


def test_seeds_change_the_run_and_the_same_seed_repeats_it(base_folder, tmp_path):
    def curve(folder, seed):
        setting = make_setting(base_folder, tmp_path / folder, max_steps=10, max_items=2)
        return run(make_run_config(setting, "malora", seed), setting).train.curve

    assert curve("a", 0) == curve("b", 0) != curve("c", 1)


def test_a_run_that_is_recorded_is_not_run_again(setting, monkeypatch):
    config = make_run_config(setting, "lora", seed=0)
    first = run(config, setting)
    monkeypatch.setattr(bench.runs.run, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run(config, setting).items == first.items


def test_a_loss_that_is_not_finite_is_recorded_as_diverged(setting, monkeypatch):
    calls = iter(range(100))

    def exploding(self, micro_batches, original=TrainStep.__call__):
        loss, balance = original(self, micro_batches)
        return (loss * float("nan") if next(calls) >= 12 else loss), balance

    monkeypatch.setattr(TrainStep, "__call__", exploding)
    result = run(make_run_config(setting, "malora", seed=0), setting)
    assert result.status == "diverged" and "step 15" in result.error  # the 13th is read at the checkpoint
    written = json.loads(result.path.read_text())
    assert written["train"]["steps"] == 15 and written["train"]["curve"][-1]["loss"] is None and written["test"] is None
    assert written["train"]["curve"][0]["loss"] > 0


def test_a_run_that_breaks_is_recorded_as_failed_and_made_again(setting, monkeypatch):
    config = make_run_config(setting, "lora", seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(bench.runs.run, "score", lambda *a, **k: 1 / 0)
        broken = run(config, setting)
    assert broken.status == "failed" and "ZeroDivisionError" in broken.error
    assert store.read_all(setting.results) == []
    assert run(config, setting).status == "ok"


def test_scoring_goes_on_where_it_was_killed(base_folder, tmp_path, monkeypatch):
    """Kill a run after every third batch that it scores: inside tasks, between them and between the splits."""
    computed, kills, kills_at = [], 0, 1000
    append = AnswerJournal._append

    def count(self, content):
        append(self, content)
        computed.append(json.loads(content)[0])
        if len(computed) % kills_at == 0:
            raise KilledError

    monkeypatch.setattr(AnswerJournal, "_append", count)

    def outcome(folder):
        nonlocal kills
        setting = make_setting(base_folder, tmp_path / folder, max_steps=5, max_items=3)
        profile = replace(setting.profile, eval_batch_size=4, generation_batch_size=2)
        setting = replace(setting, mixture="inter", profile=profile)
        config = make_run_config(setting, "malora", seed=0, learning_rate=1e-2)
        computed.clear()
        while True:
            try:
                result = run(config, setting)
                break
            except KilledError:
                kills += 1
                assert not store.read_all(setting.results)
        assert result.status == "ok", result.error
        assert {path.suffix for path in snapshot(setting.results)} == {".json", ".gz"}
        assert result.train.seconds["evaluation"] > 0
        return result.items, result.test, result.validation, result.train.curve, [*computed]

    expected = outcome("unbroken")
    assert kills == 0 and len({*expected[-1]}) == len(expected[-1])
    kills_at = 3
    assert outcome("killed") == expected  # so no batch was computed twice
    assert kills == len(expected[-1]) // 3 > 2


def test_out_of_memory_is_recorded_as_such(setting, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("60 GiB wanted")

    monkeypatch.setattr(bench.runs.run, "train", out_of_memory)
    assert run(make_run_config(setting, "lora", seed=0), setting).status == "oom"


def test_a_recorded_run_leaves_neither_failures_nor_a_checkpoint(base_folder, tmp_path, monkeypatch):
    setting = make_setting(base_folder, tmp_path, max_steps=5, max_items=2)
    config = make_run_config(setting, "lora", seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(bench.runs.run, "score", lambda *a, **k: 1 / 0)
        assert run(config, setting).status == "failed"
    checkpoint = checkpoint_of(config, setting)
    assert checkpoint.is_file()
    kept = checkpoint.read_bytes()
    recorded = run(config, setting)
    files = {recorded.path, recorded.path.with_suffix(".items.csv.gz")}
    assert set(snapshot(tmp_path)) == files
    checkpoint.write_bytes(kept)  # as if the process had been killed after it wrote the record
    assert run(config, setting).items == recorded.items and set(snapshot(tmp_path)) == files
    checkpoint.write_bytes(kept)
    assert [one.items for one in run_all([(config, setting)], jobs=1)] == [recorded.items]
    assert set(snapshot(tmp_path)) == files


@pytest.mark.parametrize("file", ["checkpoint", "record"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(file, base_folder, tmp_path, monkeypatch, capsys):
    command = [*"run --profile tiny --max-steps 2 --max-items 2 --results".split(), tmp_path, "--model", base_folder]
    before = snapshot(tmp_path)

    def save(state, file, **options):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/4")

    def flush(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if file == "checkpoint":
            patched.setattr(torch, "save", save)
        else:
            patched.setattr(os, "fsync", flush)
        assert main([str(a) for a in command]) == 1
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert {path for path in snapshot(tmp_path) if "checkpoints" not in path.parts} == before.keys()
    assert not list(tmp_path.rglob(".*"))
    assert main([str(a) for a in command]) == 0  # with space again
