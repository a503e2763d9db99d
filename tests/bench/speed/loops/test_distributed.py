"""Rows that several processes train: on data of their own, with equal weights, in turns with rows on one GPU."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.errors import UserError
from bench.records import store
from bench.speed import cli
from bench.speed.loops import rounds
from bench.speed.loops.distributed import ranks
from bench.speed.loops.distributed.ranks import DistributedRow, Ranks, check_world
from bench.speed.loops.rows import all_rows
from bench.speed.steps import Workload
from tests import processes

CPU = torch.device("cpu")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # FSDP2 takes a GPU if it sees one
WORK = Workload("train", batch=2, length=16, tokens=64, dropout=0.0, vocab_size=512)


def test_processes_train_one_model_on_data_of_their_own():
    names = ["malora-plain-ddp", "malora-captured-ddp", "malora-lean-plain-fsdp"]
    done = processes.run(
        Path(__file__).with_name("train_in_turn.py"), *names, "peft-lora-ddp", "peft-lora-fsdp", count=2
    )
    assert done.returncode == 0, done.stderr
    first, second = sorted(map(json.loads, done.stdout.splitlines()), key=lambda found: found["rank"])
    for name, one in first["rows"].items():
        other = second["rows"][name]
        assert one["losses"][0] != other["losses"][0], name  # other tokens
        assert one["losses"][1] < one["losses"][0] and other["losses"][1] < other["losses"][0], name
        assert one["weights"] == other["weights"], name  # after two steps with averaged gradients
    expected = first["rows"][names[0]]
    for name in names[1:]:
        found = first["rows"][name]
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-3), name
        assert found["weights"] == pytest.approx(expected["weights"], rel=1e-4), name
        assert found["held"] == expected["held"] // (2 if name.endswith("fsdp") else 1), name


def test_two_processes_take_turns_with_a_row_on_one_gpu(tmp_path, monkeypatch):
    log = []

    def ask(self, do, arguments, _ask=Ranks._ask):
        answers = _ask(self, do, arguments)
        log.append((do, answers))
        return answers

    monkeypatch.setattr(Ranks, "_ask", ask)
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 0.1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # in the new processes, where it takes seconds
    names = ["malora-captured-ddp", "peft-lora", "peft-lora-fsdp"]
    work = ["--layers", "1", "--rounds", "1", "--length", "16", "--tokens", "64"]
    arguments = ["--loop", "plain", "--world", "2", *work, "--results", str(tmp_path)]
    assert cli.main([*arguments, "--variant", ",".join(names)]) == 0
    (record,) = store.read_speed(tmp_path)
    ddp, alone, fsdp = record.rows
    assert record.options.world == 2 and [row.name for row in record.rows] == names
    assert [(row.status, row.parallel, row.world) for row in (ddp, alone, fsdp)] == [
        ("ok", "ddp", 2), ("ok", None, None), ("ok", "fsdp", 2),
    ]  # fmt: skip
    joined = [{answer["process"] for answer in answers} for do, answers in log if do == "join"]
    assert len(joined) == 1 and len(joined[0] - {os.getpid()}) == 2  # they serve both rows
    steps = [answers for do, answers in log if do == "step"]
    slowest = [max(answer["seconds"] for answer in answers) for answers in steps]
    assert set(ddp.seconds["step"] + fsdp.seconds["step"]) <= set(slowest)
    assert all(one["loss"] != other["loss"] for one, other in steps)


STAND_IN = """
import json, sys, time

for line in sys.stdin:
    command = json.loads(line)
    rank = command.get("rank", globals().get("rank"))
    if command["do"] == "step" and rank == 0:
        time.sleep(60)  # in a collective, for the other process
    answer = {"error": "OutOfMemoryError: no memory", "out_of_memory": True} if command["do"] == "step" else {}
    print(json.dumps(answer), flush=True)
"""


def test_a_process_that_fails_ends_the_others_and_the_next_row_has_new_ones(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(ranks, "COMMAND", (sys.executable, str(tmp_path / "stand_in.py")))
    with Ranks(2, "toy", 1, WORK, CPU) as group:
        row = DistributedRow(all_rows()["malora-plain-ddp"], group)
        start = time.monotonic()
        with pytest.raises(torch.OutOfMemoryError, match="no memory"), row.opened() as program:
            running = [worker.process for worker in group.workers]
            program.step()
        assert time.monotonic() - start < 30 and all(process.returncode is not None for process in running)
        with row.opened():
            again = [worker.process for worker in group.workers]
    assert len(again) == 2 and not set(again) & set(running)
    assert [process.returncode for process in again] == [0, 0]


def test_a_gpu_that_is_not_there_is_an_error_for_people(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--world 2 needs 2 GPUs, and there is 1 GPU here"):
        check_world(2, torch.device("cuda"))
    check_world(1, torch.device("cuda"))
    check_world(2, CPU)
