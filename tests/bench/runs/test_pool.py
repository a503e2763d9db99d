"""Many runs at a time."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bench.runs.pool
import bench.runs.run
from bench.runs.pool import run_all
from bench.runs.setting import make_run_config

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_run_without_memory_next_to_others_is_made_again_by_itself(setting, monkeypatch):
    failed, train = [], bench.runs.run.train

    def crowded(*args, **kwargs):
        if len(failed) < 2:
            failed.append(args)
            raise torch.OutOfMemoryError("60 GiB wanted")
        return train(*args, **kwargs)

    # Threads, because a patch does not reach other processes.
    monkeypatch.setattr(bench.runs.pool, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench.runs.run, "train", crowded)
    runs = [(make_run_config(setting, method, seed=0), setting) for method in ("lora", "asylora", "malora")]
    made = list(run_all(runs, jobs=2))
    assert [(one.config.method, one.status) for one in made] == [("malora", "ok"), ("lora", "ok"), ("asylora", "ok")]
    assert [one.provenance.concurrent_runs for one in made] == [2, 1, 1]
