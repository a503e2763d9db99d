"""Commands that are killed at any moment, and repeated, end as if nothing had happened.

`MALORA_KILLS` is the number of kills, and `MALORA_KILLS_SEED` their seed.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import bench.report.html  # noqa: F401  # before the programs are forked: they would import it anew each time
from bench.records import provenance, store
from tests import processes

PROGRAM = Path(__file__).with_name("killed_program.py")
KILLS = int(os.environ.get("MALORA_KILLS", "6"))
SEED = int(os.environ.get("MALORA_KILLS_SEED", "0"))
MAX_IN_A_ROW = 8  # kills of one run, before it may end
SHARE_OF_JOBS = 0.2  # of the kills, those of the parent of two workers
MAX_SECONDS_OF_ORPHANS = 5.0


@pytest.fixture
def command(base_folder):
    def run(runs, folder, *when):
        if not folder.exists():
            (folder / "results").mkdir(parents=True)
            (folder / "README.md").write_bytes((provenance.ROOT / "README.md").read_bytes())
        done = processes.run(PROGRAM, runs, folder, base_folder, *when, folder=folder)
        require_no_process(folder)
        return done

    return run


def require_no_process(folder):
    """Wait until no process has this working directory, which workers inherit."""
    deadline = time.monotonic() + MAX_SECONDS_OF_ORPHANS
    while found := [path.parent for path in Path("/proc").glob("[0-9]*/cwd") if is_in(path, folder)]:
        assert time.monotonic() < deadline, f"these live on: {found}"
        time.sleep(0.05)


def is_in(link, folder):
    try:
        return Path(os.readlink(link)) == folder
    except OSError:  # it has ended, or is another user's
        return False


def outcome(folder):
    """Return all that must not depend on interruptions: the files' names, and the records without times."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    found = []
    for record, published in zip(
        store.read_all(folder / "local"), store.read_all(folder / "results" / "tiny"), strict=True
    ):
        assert record.items == published.items and record.config == published.config
        content = json.loads(record.path.read_text())
        train = {name: (content["train"] or {}).get(name) for name in ("steps", "tokens", "curve", "router")}
        sections = {name: content[name] for name in ("config", "data", "parameters", "validation", "test", "status")}
        found.append((train, sections, record.items))
    assert "</html>" in (folder / "html" / "report.html").read_text()[-20:]
    return files, found


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="finds processes in Linux's /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="forks programs, and a forked process cannot use CUDA")
@pytest.mark.timeout(240 + 40 * KILLS)  # on a busy machine
def test_killed_commands_end_in_the_unbroken_record_and_leave_no_file(command, tmp_path):
    rng = random.Random(SEED)
    where = Counter()
    for runs, most in (("run", KILLS - round(SHARE_OF_JOBS * KILLS)), ("jobs", KILLS)):
        start = time.monotonic()
        done = command(runs, tmp_path / f"unbroken-{runs}", "never")
        seconds = time.monotonic() - start
        assert done.returncode == 0, done.stderr
        events = max(int(line) for line in done.stdout.splitlines() if line.isdigit())
        expected = outcome(tmp_path / f"unbroken-{runs}")
        number = 0
        while where.total() < most:
            folder, times = tmp_path / f"{runs}-{number}", []
            for _ in range(rng.randint(1, min(MAX_IN_A_ROW, most - where.total()))):
                # Few moments are those of writing, so half of the kills are counted by files.
                by_event, by_time = ("event", rng.randint(1, events)), ("seconds", f"{rng.uniform(0, seconds):.3f}")
                times.append(rng.choice([by_event, by_time]))
                done = command(runs, folder, *times[-1])
                assert done.returncode <= 0, (times, done.stderr)
                if done.returncode == 0:
                    break
                where[runs + " " + (done.stdout.splitlines() or ["start"])[-1]] += 1
            if done.returncode != 0:
                done = command(runs, folder, "never")
            assert done.returncode == 0, (times, done.stderr)
            assert outcome(folder) == expected, times
            number += 1
    print(f"{where.total()} kills, by command and the kind of file last used: {dict(where)}")
