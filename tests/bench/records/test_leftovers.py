"""Files in a folder of results that no run needs any more."""

import errno
import json
import os
import subprocess

import pytest

from bench.cli.parser import main
from bench.records.files import MACHINE
from bench.records.leftovers import find_leftovers, is_disk_full
from tests.bench.cli.helpers import snapshot

NEEDED = (
    "runs/done.json",
    "runs/done.items.csv.gz",
    "runs/broken.failed-20260101T000000.json",
    "checkpoints/going.pt",
    "checkpoints/going.pt.damaged",
    "checkpoints/going.answers",
    "runs/going.claim",
    "table2.md",
)
UNNEEDED = {
    "checkpoints/done.pt": "checkpoint of a run that is recorded",
    "checkpoints/done.previous.pt": "checkpoint of a run that is recorded",
    "checkpoints/done.answers": "answers of a run that is recorded",
    "runs/done.failed-20260101T000000.json": "failure of a run that is recorded",
    "runs/done.failed-20260101T000000.items.csv.gz": "failure of a run that is recorded",
    "runs/lost.items.csv.gz": "items without a record",
    "runs/done.claim": "claim of a process that has ended",
    "runs/ended.claim": "claim of a process that has ended",
}


@pytest.fixture
def folder(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale = {
        f"{place}.x.{ended.pid}": "temporary file of a process that has ended"
        for place in ("", "runs/", "checkpoints/")
    }
    for name in (*NEEDED, *UNNEEDED, *stale, f"runs/.x.{os.getppid()}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "runs" / "ended.claim").write_text(json.dumps({"machine": MACHINE, "process": str(ended.pid)}))
    (tmp_path / "runs" / "just-now.items.csv.gz").touch()  # of a run that is going to write its record
    return tmp_path, stale | UNNEEDED


def test_clean_shows_what_no_run_needs_and_removes_it_with_yes(folder, capsys):
    results, unneeded = folder
    found = {str(one.path.relative_to(results)): one.reason for one in find_leftovers(results)}
    assert found == unneeded
    before = snapshot(results)
    assert main(["clean", "--results", str(results)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in unneeded) and "11 files in" in out and "--yes removes them" in out
    assert snapshot(results) == before
    assert main(["clean", "--results", str(results), "--yes"]) == 0
    assert snapshot(results).keys() == before.keys() - {results / name for name in unneeded}
    assert find_leftovers(results) == []


@pytest.mark.parametrize(
    "error, is_full",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), True),  # torch.save
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), True),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),  # safetensors
        (RuntimeError("PytorchStreamReader failed reading zip archive"), False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
    ],
)
def test_a_full_disk_is_recognized_whoever_reports_it(error, is_full):
    assert is_disk_full(error) == is_full
