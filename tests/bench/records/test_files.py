"""Atomic writes, and what they leave if they are interrupted."""

import errno
import os
import subprocess

import pytest

from bench.records.files import stale_files, write_atomically


def test_a_file_has_the_old_content_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    write_atomically(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode() and list(tmp_path.iterdir()) == [path]

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_bytes() == "ä\n".encode() and list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_ended_processes_are_found(tmp_path, monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(os, "replace", lambda *paths: os._exit(1))  # as if killed between writing and renaming
    for pid in (ended.pid, os.getppid()):
        if (child := os.fork()) == 0:
            monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
            write_atomically(tmp_path / "run.json", "{}")
        os.waitpid(child, 0)
    (tmp_path / f".run.pt.{ended.pid}").touch()  # a checkpoint's
    (tmp_path / ".gitignore").touch()
    (tmp_path / f".other-machine.json.abcdef-{ended.pid}").touch()
    found = [path.name for path in stale_files(tmp_path)]
    assert len(found) == 2 and found[0].startswith(".run.json.") and found[1] == f".run.pt.{ended.pid}"
    assert len(list(tmp_path.iterdir())) == 5
