"""Claims on runs: one process makes a run, and another one takes it over when the first has died."""

import json
import os
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import bench.runs.run
from bench.records import claims, store
from bench.records.claims import ClaimLostError, ClaimWatch, acquire, claim_path, claimed_runs, read_claim
from bench.records.files import MACHINE
from bench.runs.run import run
from bench.runs.setting import make_run_config


@pytest.fixture
def path(tmp_path):
    (tmp_path / "runs").mkdir()
    return claim_path("a-run", tmp_path)


def write_claim(path, process, machine=MACHINE):
    path.write_text(json.dumps({"machine": machine, "process": str(process), "host": "there", "claim": "0"}))
    return path


def ended_process():
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def test_one_of_many_gets_a_claim_and_the_next_one_after_it(path):
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            (claim,) = filter(None, pool.map(lambda _: acquire(path), range(8)))
            with claim:
                assert claim.is_held() and acquire(path) is None
                assert claimed_runs(path.parents[1]) == {"a-run"}
                assert str(os.getpid()) in str(read_claim(path)) and socket.gethostname() in str(read_claim(path))
            assert os.listdir(path.parent) == []


def test_one_of_many_takes_over_the_claim_of_an_ended_process(path):
    process = ended_process()
    assert ClaimWatch().look(path) == (None, False)
    assert ClaimWatch().look(write_claim(path, process)) == (read_claim(path), True)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            write_claim(path, process)
            found = list(filter(None, pool.map(lambda _: acquire(path), range(8))))
            assert [claim.is_held() for claim in found].count(True) == 1  # others were displaced at once, and know it
            for claim in found:
                with claim:
                    pass
            assert os.listdir(path.parent) == []


def test_a_claim_of_another_machine_is_taken_over_when_nothing_refreshes_it(path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)
    write_claim(path, process=os.getpid(), machine="another")
    os.utime(path, (0, 0))  # that machine's clock is wrong, which must not matter
    watch, start = ClaimWatch(), time.monotonic()
    assert watch.look(path) == (read_claim(path), False) and acquire(path) is None
    time.sleep(0.2)
    os.utime(path)  # it lives
    assert not watch.look(path)[1]
    refreshed = time.monotonic()
    while not (found := watch.look(path))[1]:
        assert time.monotonic() - start < 5
        time.sleep(0.01)
    assert time.monotonic() - refreshed >= 0.3
    os.utime(path)  # it lives again, after it was judged
    assert acquire(path, found[0]) is None and path.exists()
    claim = acquire(path, read_claim(path))
    assert claim and claim.is_held()


def test_a_new_claim_that_was_taken_for_an_expired_one_goes_back(path):
    expired = read_claim(write_claim(path, 1, "another"))
    write_claim(path, 2, "a third")
    assert not claims._remove(path, expired)
    assert "a third" in path.read_text() and os.listdir(path.parent) == [path.name]


def test_a_claim_is_refreshed_and_its_loss_is_noticed(path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    lost = threading.Event()
    with acquire(path, on_loss=lost.set) as claim:
        first = read_claim(path).refreshed
        deadline = time.monotonic() + 5
        while read_claim(path).refreshed == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lost.is_set()
        write_claim(path, os.getpid(), "another")
        assert lost.wait(5) and not claim.is_held()
    assert path.exists()  # the other's


@pytest.mark.parametrize("text", ["", "[]", "{", '{"process": "x"}', '{"process": null, "machine": 3}', "\xff"])
def test_a_claim_without_an_owner_holds_until_it_expires(path, text, monkeypatch):
    path.write_text(text, encoding="latin-1")
    assert acquire(path) is None and not read_claim(path).is_dead_here() and str(read_claim(path))
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.0)
    watch = ClaimWatch()
    state, is_dead = watch.look(path)
    assert not is_dead and watch.look(path) == (state, True) and acquire(path, state)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_whose_claim_was_lost_is_not_recorded(setting, monkeypatch):
    config = make_run_config(setting, "base", seed=0)
    store.open_folder(setting.results)
    path = claim_path(config.id, setting.results)

    def lose(record, *_):
        record.test = {}
        write_claim(path, 1, "another")

    monkeypatch.setattr(bench.runs.run, "_make", lose)
    with acquire(path) as claim, pytest.raises(ClaimLostError, match="process 1 on there"):
        run(config, setting, claim=claim)
    assert os.listdir(path.parent) == [path.name]
