"""Many runs at a time."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bench.runs.pool
import bench.runs.run
from bench.runs.pool import run_all
from bench.runs.setting import make_run_config
from tests import processes

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


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds workers in Linux's /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="workers are forked, and a forked process cannot use CUDA")
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_workers_end_with_their_parent_and_begin_no_run(signal, base_folder, tmp_path):
    options = "--profile tiny --methods lora,molora,malora --seeds 3 --max-items 2 --model".split()
    done = processes.run(Path(__file__).with_name("end_parent.py"), signal, tmp_path, *options, base_folder, timeout=90)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < 5.0
    assert found["after"] == found["before"]
    if signal == "SIGINT":
        assert found["code"] == 130 and found["alive_after_parent"] == [] and found["temporary"] == []
        assert "stopping 2 worker processes" in done.stderr and "stopped" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
