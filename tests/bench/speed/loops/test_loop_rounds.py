"""Rounds of training programs: in turns, by the wall clock, with the record written as they go."""

import logging
from contextlib import contextmanager

import pytest
import torch

from bench.records import store
from bench.speed import cli
from bench.speed.loops import call, rounds

CPU = torch.device("cpu")


class Fake:
    """A row, and its program, that logs its turns and takes a second for the first step and half for the others."""

    def __init__(self, name, log, error=None):
        self.about, self.log, self.error, self.steps = {"name": name}, log, error, 0

    @contextmanager
    def opened(self):
        self.log.append(self.about["name"])
        if self.error:
            raise self.error
        self.steps = 0
        yield self

    def step(self):
        self.steps += 1
        return 1.0 if self.steps == 1 else 0.5

    def warm(self, seconds):
        self.warmed = seconds

    def loss(self):
        return 6.0

    def peak_bytes(self):
        return {"allocated": 10 * len(self.log), "reserved": 20}

    def counts(self):
        return {"kernels": 3}


def test_rounds_alternate_and_each_result_is_saved_at_once():
    log, saved = [], []
    rows = [Fake("a", log), Fake("b", log, torch.OutOfMemoryError("Tried to allocate 2 GiB.")), Fake("c", log)]
    rounds.measure(rows, 2, CPU, lambda found, number: saved.append((number, [dict(r) for r in found])))
    assert log == list("abcca")  # a row that does not fit is not tried again
    assert [(number, len(found)) for number, found in saved] == [(1, 1), (1, 2), (1, 3), (2, 3), (2, 3)]
    a, b, c = saved[-1][1]
    assert a["seconds"]["step"] == [0.5] * 2 * 6 and a["loss"] == 6.0 and a["kernels"] == 3  # 3 s of half a second each
    assert (b["status"], b["reason"]) == ("oom", "Tried to allocate 2 GiB.") and not b["seconds"]
    assert c["peak_bytes"] == {"allocated": 40, "reserved": 20}  # the larger of the rounds


def test_what_the_package_warns_of_is_the_rows_reason():
    class NotCaptured(Fake):
        def step(self):
            logging.getLogger("malora.backbone.capture").warning("Passes are not %s.", "captured")
            return super().step()

    saved = []
    rounds.measure([NotCaptured("a", [])], 1, CPU, lambda found, _: saved.extend(found))
    assert saved[0]["reason"] == "Passes are not captured." and saved[0]["status"] == "ok"


def test_no_round_is_started_that_would_end_too_late():
    rounds.measure([Fake("a", log := [])], 5, CPU, lambda *_: None, seconds=0)
    assert log == ["a"]


def run(folder, *arguments):
    common = ["--loop", "plain", "--layers", "1", "--rounds", "1", "--length", "16", "--tokens", "64"]
    return cli.main([*common, *arguments, "--results", str(folder)])


def test_a_call_writes_one_record_and_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 0.1)
    assert run(tmp_path, "--variant", "floor,malora-lean-plain") == 0
    (record,) = store.read_speed(tmp_path)
    floor, ours = record.rows
    assert record.mode == "loop" and record.options.world == 1 and not record.complete
    assert (ours.loop, ours.checkpointing, ours.base, ours.backend) == ("plain", "lean", "bf16", "auto")
    assert len(floor.seconds["step"]) >= rounds.MIN_STEPS and floor.loss == pytest.approx(6.24, abs=0.1)
    page = (tmp_path / "table10.md").read_text()
    assert "toy, whole training programs" in page and "`malora-lean-plain`" in page
    assert "| not measured" in page  # the goals
    assert "toy, whole training programs" in capsys.readouterr().out


def test_a_call_that_is_cut_off_leaves_what_it_has(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(call, "LocalRow", lambda row, *_: Fake(row.name, []))
    turns = iter([rounds._turn, stop])
    monkeypatch.setattr(rounds, "_turn", lambda *arguments: next(turns)(*arguments))
    assert run(tmp_path, "--variant", "floor,peft-lora") == 130
    (record,) = store.read_speed(tmp_path)
    assert [row.name for row in record.rows] == ["floor"] and record.rows[0].seconds["step"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--loop", "fast"], "--loop fast is unknown; there are plain, compiled, captured"),
        (["--loop", "plain", "--base", "int4"], "--base int4 is unknown; there are bf16, nf4, int8, fp8"),
        (["--checkpointing", "lean"], "--checkpointing is for whole training programs; add --loop"),
        (["--loop", "plain", "--mode", "decode"], "leave --sweep and --mode out"),
        (["--world", "2"], "--world is for whole training programs; add --loop"),
        (["--loop", "plain", "--world", "2", "--variant", "floor"], "--world 2 has no effect"),
        (["--loop", "plain", "--variant", "malora-plain-ddp"], "trains on several GPUs; add --world 2"),
        (["--loop", "plain", "--baselines", "nowhere"], "--baselines nowhere has no package unsloth"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path):
    assert cli.main([*arguments, "--results", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
