"""A run whose record and checkpoints are behind a URL, and whose machine is lost."""

import tempfile
from dataclasses import replace
from uuid import uuid4

import pytest
import torch

from bench.records import store
from bench.records.claims import ClaimLostError, acquire
from bench.records.remote import open_remote
from bench.runs import remote_run
from bench.runs.remote_run import Pusher, run_remotely
from bench.runs.run import checkpoint_of, run, unfinished_files
from bench.runs.setting import make_run_config
from bench.train.step import TrainStep
from tests.bench.train.test_checkpoint import KilledError

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def remote():
    return open_remote(f"memory://{uuid4().hex}/results")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files of this test's machines."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_run_whose_machine_is_lost_goes_on_elsewhere_and_ends_in_the_unbroken_record(
    setting, remote, temporary, monkeypatch
):
    setting = replace(setting, max_steps=12, max_items=4)
    config = make_run_config(setting, "malora", seed=0)
    unbroken = run(config, setting)
    steps, first, pushed = [], [], []

    def step(self, micro_batches, original=TrainStep.__call__):
        steps.append(len(steps))
        if len(steps) == 8:
            first[0]._push_changed()
            pushed.extend(remote.names("checkpoints"))
            raise KilledError
        return original(self, micro_batches)

    def started(self, start=Pusher.__enter__):
        first.append(self)
        start(self)

    monkeypatch.setattr(Pusher, "__enter__", started)
    monkeypatch.setattr(TrainStep, "__call__", step)
    with pytest.raises(KilledError), acquire(remote.claim(config.id)) as claim:
        run_remotely(config, setting, 1, claim, remote)
    assert pushed == [f"checkpoints/{config.id}.pt"] and list(temporary.iterdir()) == []
    with acquire(remote.claim(config.id)) as claim:
        made = run_remotely(config, setting, 1, claim, remote)
    assert len(steps) == 8 + 12 - 5  # the second machine went on from step 5
    assert list(temporary.iterdir()) == []
    remote.pull_records(temporary)
    (found,) = store.read_all(temporary)
    for one in (made, found):
        assert (one.train.curve, one.train.steps) == (unbroken.train.curve, unbroken.train.steps)
        assert (one.test, one.validation, one.items) == (unbroken.test, unbroken.validation, unbroken.items)
    assert remote.names("checkpoints") == [] and remote.claimed_runs() == set()
    assert len(remote.names("runs")) == 2
    with acquire(remote.claim(config.id)) as claim:  # a task that begins now finds the record
        assert run_remotely(config, setting, 1, claim, remote).items == unbroken.items
    assert len(steps) == 15


def test_a_thread_pushes_what_has_changed(setting, remote, monkeypatch):
    monkeypatch.setattr(remote_run, "PUSH_SECONDS", 0.01)
    config = make_run_config(setting, "base", seed=0)
    files = unfinished_files(config, setting)
    files[0].parent.mkdir()
    with Pusher(files, setting.results, remote):
        for content in (b"one", b"two!"):
            files[1].write_bytes(content)
            while not remote.exists(f"checkpoints/{config.id}.pt") or content != remote.read(
                f"checkpoints/{config.id}.pt"
            ):
                pass  # the test's time limit ends it
    assert remote.names("checkpoints") == [f"checkpoints/{config.id}.pt"]


def test_a_run_of_a_lost_claim_is_not_pushed_and_one_without_memory_leaves_no_checkpoint(setting, remote, monkeypatch):
    config = make_run_config(setting, "base", seed=0)
    name = f"checkpoints/{config.id}.pt"
    remote.write(name, b"checkpoint")

    def lose(config, setting, jobs, claim):
        assert checkpoint_of(config, setting).read_bytes() == b"checkpoint"
        remote.create(f"claims/{config.id}.2", b"another's")
        claim.require()

    def crowded(config, setting, jobs, claim):
        checkpoint_of(config, setting).unlink()
        raise torch.OutOfMemoryError("60 GiB wanted")

    monkeypatch.setattr(remote_run, "run", lose)
    with acquire(remote.claim(config.id)) as claim, pytest.raises(ClaimLostError):
        run_remotely(config, setting, 1, claim, remote)
    assert remote.exists(name) and remote.names("runs") == []
    remote.remove(*remote.names("claims"))
    monkeypatch.setattr(remote_run, "run", crowded)
    with acquire(remote.claim(config.id)) as claim, pytest.raises(torch.OutOfMemoryError):
        run_remotely(config, setting, 2, claim, remote)
    assert not remote.exists(name)
