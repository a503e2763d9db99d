"""Commands that are killed at any moment, and repeated, end as if nothing had happened.

`MALORA_KILLS` is the number of kills, and `MALORA_KILLS_SEED` their seed.
"""

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch

from bench.records import provenance, store
from tests import processes

PROGRAM = Path(__file__).with_name("killed_program.py")
KILLS = int(os.environ.get("MALORA_KILLS", "6"))
SEED = int(os.environ.get("MALORA_KILLS_SEED", "0"))
MAX_IN_A_ROW = 5  # kills of one run, before it may end


@pytest.fixture
def command(base_folder, tmp_path):
    def run(folder, *when):
        if not folder.exists():
            (folder / "results").mkdir(parents=True)
            (folder / "README.md").write_bytes((provenance.ROOT / "README.md").read_bytes())
        return processes.run(PROGRAM, folder, base_folder, *when)

    return run


def outcome(folder):
    """Return all that must not depend on interruptions: the files' names, and the record without times."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (record,) = store.read_all(folder / "local")
    (published,) = store.read_all(folder / "results" / "tiny")
    assert record.items == published.items and record.config == published.config
    content = json.loads(record.path.read_text())
    train = {name: content["train"][name] for name in ("steps", "tokens", "curve", "router")}
    sections = {name: content[name] for name in ("config", "data", "parameters", "validation", "test", "status")}
    return files, train, sections, record.items


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks programs, and a forked process cannot use CUDA")
@pytest.mark.timeout(240 + 10 * KILLS)  # on a busy machine too
def test_killed_commands_end_in_the_unbroken_record_and_leave_no_file(command, tmp_path):
    start = time.monotonic()
    done = command(tmp_path / "unbroken", "never")
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    events = int(done.stdout.splitlines()[-1])
    expected = outcome(tmp_path / "unbroken")
    rng = random.Random(SEED)
    kills = number = 0
    while kills < KILLS:
        folder, times = tmp_path / str(number), []
        for _ in range(rng.randint(1, MAX_IN_A_ROW)):
            # Few moments are those of writing, so half of the kills are counted by files.
            times.append(rng.choice([("event", rng.randint(1, events)), ("seconds", f"{rng.uniform(0, seconds):.3f}")]))
            done = command(folder, *times[-1])
            assert done.returncode <= 0, (times, done.stderr)
            if done.returncode == 0:
                break
            kills += 1
        done = command(folder, "never")
        assert done.returncode == 0, (times, done.stderr)
        assert outcome(folder) == expected, times
        number += 1
