"""A killed run continues from its checkpoint."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR

from bench.records import files
from bench.runs.run import run
from bench.runs.setting import make_run_config
from bench.train.checkpoint import Checkpoint, TrainLog, previous_checkpoint, remove_checkpoints
from bench.train.step import TrainStep
from tests.bench.conftest import make_setting

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class KilledError(BaseException):
    """Stands for a signal: no `except Exception` catches it."""


@pytest.mark.parametrize("method, damaged", [("lora", False), ("malora", False), ("malora", True)])
def test_a_killed_run_that_is_resumed_ends_bitwise_like_an_unbroken_one(
    method, damaged, base_folder, tmp_path, monkeypatch, capsys
):
    """Kill a run at step 8, after the checkpoint at step 5, and resume it.

    With dropout the generator's state is tested as well. If the only checkpoint is damaged, the run starts anew.
    """

    def train_adapter(folder):
        setting = make_setting(base_folder, tmp_path / folder, max_items=2, save=tmp_path / folder / "adapter")
        result = run(make_run_config(setting, method, seed=0, learning_rate=1e-2), setting)
        assert result.status == "ok", result.error
        return (tmp_path / folder / "adapter" / "adapter_model.safetensors").read_bytes(), result

    unbroken, expected = train_adapter("unbroken")
    with monkeypatch.context() as patched:
        calls = iter(range(100))

        def killed_at_step_8(self, micro_batches, original=TrainStep.__call__):
            if next(calls) == 8:
                raise KilledError
            return original(self, micro_batches)

        patched.setattr(TrainStep, "__call__", killed_at_step_8)
        with pytest.raises(KilledError):
            train_adapter("killed")
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.pt")
    assert not (tmp_path / "killed" / "runs").exists()
    if damaged:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    resumed, result = train_adapter("killed")
    assert resumed == unbroken
    assert result.train.curve == expected.train.curve and result.items == expected.items
    assert ("training starts anew." in capsys.readouterr().err) == damaged
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())


def test_every_process_gets_its_own_random_numbers_back(tmp_path, monkeypatch):
    """With those of the first process, all would drop out the same activations after a resume."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    states = [(torch.Generator().manual_seed(seed).get_state(), None) for seed in range(2)]

    def gather(mine):
        return states if isinstance(mine[0][0], torch.Tensor) else mine

    monkeypatch.setattr("bench.train.checkpoint.gather_object", gather)

    def checkpoint(process_index):
        path = tmp_path / "checkpoint.pt"
        return Checkpoint(path, "id", model, optimizer, ConstantLR(optimizer), process_index)

    checkpoint(1).save(TrainLog())
    assert not list(tmp_path.iterdir())  # the first process writes
    checkpoint(0).save(TrainLog(steps=3))
    for process_index, (state, _) in enumerate(states):
        assert checkpoint(process_index).load() == TrainLog(steps=3)
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    checkpoint(2).load()  # fewer processes wrote it
    assert torch.equal(torch.get_rng_state(), before)


def test_no_process_continues_from_a_file_that_another_could_not_read(tmp_path, monkeypatch, capsys):
    """Otherwise they would train from different steps."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    path = tmp_path / "checkpoint.pt"
    checkpoint = Checkpoint(path, "id", model, optimizer, ConstantLR(optimizer))
    checkpoint.save(TrainLog(steps=1))
    checkpoint.save(TrainLog(steps=2))
    others = iter([("is damaged", False), (None, True)])
    monkeypatch.setattr("bench.train.checkpoint.gather_object", lambda mine: [*mine, next(others)])
    assert checkpoint.load() == TrainLog(steps=1)
    assert "checkpoint.pt is damaged: the file was renamed" in capsys.readouterr().err
    monkeypatch.setattr("bench.train.checkpoint.gather_object", lambda mine: [*mine, (None, False)])
    assert checkpoint.load() is None and previous_checkpoint(path).exists()  # on a disk that the other lacks


def test_two_machines_that_share_a_folder_do_not_share_temporary_files(tmp_path, monkeypatch):
    """Their processes may have the same id, and make the same run."""
    path = tmp_path / "run.pt"
    mine = files.temporary_path(path)
    with monkeypatch.context() as other_machine:
        other_machine.setattr(files, "MACHINE", "abcdef")
        theirs = files.temporary_path(path)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    written = []
    monkeypatch.setattr("bench.train.checkpoint.write_state", lambda path, state: written.append(path) or path.touch())
    for _ in range(2):
        Checkpoint(path, "id", model, optimizer, ConstantLR(optimizer)).save(TrainLog())
    assert written == [mine, mine] and theirs != mine
    for file in (mine, theirs):
        file.touch()
    remove_checkpoints(path)
    assert list(tmp_path.iterdir()) == [theirs]
