"""A folder of results behind a URL: its files and claims, on memory:// and file://."""

import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import fsspec
import pytest

from bench.errors import UserError
from bench.records import claims
from bench.records.claims import ClaimWatch, acquire
from bench.records.remote import RemoteClaim, RemoteFolder, open_remote


@pytest.fixture(params=["memory", "file"])
def remote(request, tmp_path):
    url = f"memory://{uuid4().hex}/results" if request.param == "memory" else (tmp_path / "remote").as_uri()
    return open_remote(url)


def everything(remote):
    driver, path = fsspec.url_to_fs(remote.url)
    return [name.removeprefix(path).strip("/") for name in driver.find(path)]


def test_files_arrive_as_they_were(remote, tmp_path):
    content = bytes(range(256)) * 1000
    assert remote.names("runs") == [] and not remote.exists("runs/a.json")
    remote.write("runs/a.json", b"old")
    remote.write("runs/a.json", content)
    remote.write("runs/.b", b"")
    assert remote.names("runs") == ["runs/a.json"] and remote.names("runs", "*.csv") == []
    assert remote.exists("runs/a.json") and pickle.loads(pickle.dumps(remote)).read("runs/a.json") == content
    remote.pull(["runs/a.json", "runs/none"], tmp_path)
    assert (tmp_path / "runs" / "a.json").read_bytes() == content and not (tmp_path / "runs" / "none").exists()
    remote.remove("runs/a.json", "runs/none", "runs/.b")
    assert everything(remote) == []
    with pytest.raises(FileNotFoundError):
        remote.read("runs/a.json")


def test_one_of_many_creates_a_file(remote):
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            created = list(
                pool.map(lambda text, n=number: remote.create(f"runs/{n}", text), [b"%d" % i for i in range(8)])
            )
            assert created.count(True) == 1 and remote.read(f"runs/{number}") == b"%d" % created.index(True)
    assert len(everything(remote)) == 20


def test_a_record_comes_after_its_items_and_is_never_replaced(remote, tmp_path):
    here, there = tmp_path / "here" / "runs", tmp_path / "there"
    here.mkdir(parents=True)
    for name, text in (("a.json", "record"), ("a.items.csv.gz", "items"), ("b.failed-1.json", "failed")):
        (here / name).write_text(text)
    assert remote.push_record(here / "a.json") and remote.push_record(here / "b.failed-1.json")
    (here / "a.json").write_text("another")
    (here / "a.items.csv.gz").write_text("other items")
    assert not remote.push_record(here / "a.json")
    remote.pull_records(there)
    found = {path.name: path.read_text() for path in (there / "runs").iterdir()}
    assert found == {"a.json": "record", "a.items.csv.gz": "items", "b.failed-1.json": "failed"}
    remote.remove_failures("b")
    assert remote.names("runs") == ["runs/a.items.csv.gz", "runs/a.json"]


def test_leftovers_of_killed_processes_are_removed(remote):
    kept = ["runs/a.json", "checkpoints/b.pt", "checkpoints/b.answers", "claims/b.1"]
    for name in [*kept, "checkpoints/a.pt", "checkpoints/a.previous.pt", "checkpoints/a.answers"]:
        remote.write(name, b"")
    remote.remove_leftovers()
    assert sorted(everything(remote)) == sorted(kept)


def test_one_of_many_gets_a_claim_and_the_next_one_after_it(remote):
    place = remote.claim("a-run.1")
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            (claim,) = filter(None, pool.map(lambda _: acquire(place), range(8)))
            with claim:
                assert claim.is_held() and acquire(place) is None
                assert remote.claimed_runs() == {"a-run.1"} and acquire(remote.claim("a-run")) is not None
                remote.remove("claims/a-run.1")
            assert everything(remote) == []


def test_an_expired_claim_is_taken_over_by_one(remote, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.2)
    place, dead = remote.claim("a-run"), json.dumps({"machine": "another", "process": "1"})
    assert place.create(dead, None)
    watch = ClaimWatch()
    state, is_dead = watch.look(place)
    assert state.text == dead and not is_dead and acquire(place) is None
    place.refresh(dead)
    refreshed = time.monotonic()
    assert watch.look(place)[0] != state and acquire(place, state) is None  # it lives
    while not (found := watch.look(place))[1]:
        assert time.monotonic() - refreshed < 5
        time.sleep(0.02)
    assert time.monotonic() - refreshed >= 0.2
    with ThreadPoolExecutor(8) as pool:
        (claim,) = filter(None, pool.map(lambda _: acquire(place, found[0]), range(8)))
    # The first owner was only suspended. What it writes late changes nothing.
    place.refresh(dead)
    place.remove(dead)
    remote.write("claims/a-run.1", b"late")
    with claim:
        assert claim.is_held()
    assert everything(remote) == []


def test_a_claim_is_refreshed_and_its_loss_is_noticed(remote, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    place, lost = remote.claim("a-run"), threading.Event()
    with acquire(place, on_loss=lost.set) as claim:
        first, deadline = place.read().refreshed, time.monotonic() + 5
        while place.read().refreshed == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lost.is_set()
        remote.create("claims/a-run.2", b"another's")
        assert lost.wait(5) and not claim.is_held()
        with pytest.raises(claims.ClaimLostError, match="a-run is now that of process"):
            claim.require()
    assert place.read().text == "another's"


@pytest.mark.parametrize(
    "url, reason",
    [
        ("http://host/results", "not of a kind in which a file can be created exclusively"),
        ("simplecache::s3://bucket/results", "not of a kind"),
        ("memory://", "names no folder"),
        ("file:///dev/null/results", "does not answer"),
    ],
)
def test_urls_that_cannot_be_used(url, reason):
    with pytest.raises(UserError, match=reason):
        open_remote(url)


def test_a_driver_that_is_missing_is_named(monkeypatch):
    def missing(*args, **options):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match="needs the package gcsfs: pip install gcsfs"):
        open_remote("gs://bucket/results")


def test_errors_of_a_driver_are_those_of_files(monkeypatch):
    class Failing(RemoteFolder):
        def _storage(self):
            raise RuntimeError("no credentials")

    with pytest.raises(OSError, match=r"memory://a: RuntimeError: no credentials"):
        RemoteClaim(Failing("memory://a"), "a-run").read()
