"""Tables on a Ray cluster: two machines, which are process groups of this one, on the loopback interface."""

import json
import os
import re
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from bench.records import claims, store
from bench.records.claims import claim_path, read_claim
from bench.records.remote import open_remote
from bench.runs import ray_engine
from bench.train.checkpoint import DamagedError, read_state
from tests import processes
from tests.bench.runs.ray_table import make_table

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

PROGRAM = Path(__file__).with_name("ray_table.py")
RUNS = 5
MIN_STEPS = 20  # of a run before its worker is killed: a run that starts anew writes a checkpoint of five steps
MAX_SECONDS = 150.0

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("fresh_accelerator")]


@pytest.fixture(scope="module")
def cluster():
    """A cluster without runs on the head, and with a place for one run on each of two other machines."""
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "500", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        nodes = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args={**nodes, "num_cpus": 0})
        patch.setenv("RAY_ADDRESS", made.address)
        made.add_one = lambda: made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        made.add_one(), made.add_one()
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def unbroken(base_folder, tmp_path_factory):
    """The records of the local engine."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert make_table(base_folder, "--results", folder, "--jobs", 1) == 0
    return outcome(folder)


def outcome(folder):
    """Return by run all that must not depend on the engine: the record without times and machine."""
    records = {}
    for record in store.read_all(folder):
        content = json.loads(record.path.read_text())
        train = content["train"] and {name: content["train"][name] for name in ("steps", "tokens", "curve", "router")}
        sections = {name: content[name] for name in ("config", "data", "parameters", "validation", "test", "status")}
        records[record.id] = train, sections, record.items
    return records


def steps_of(checkpoint):
    """Return the steps in a checkpoint, or 0 if there is none."""
    try:
        return read_state(checkpoint)["log"]["steps"]
    except (FileNotFoundError, DamagedError):
        return 0


def kill_a_machine(results, seen):
    """Kill the worker of a run that trains, and the process of its machine that could start another.

    `seen` gets the id of the run, the process, its steps, and the steps in the checkpoints after that.
    """
    deadline = time.monotonic() + MAX_SECONDS
    while time.monotonic() < deadline:
        for checkpoint in results.glob("checkpoints/[!.]*.pt"):
            run_id = checkpoint.stem
            if run_id.endswith("previous") or steps_of(checkpoint) < MIN_STEPS:
                continue
            if not (state := read_claim(claim_path(run_id, results))):
                continue
            worker = psutil.Process(int(json.loads(state.text)["process"]))
            machine = worker.parent()
            assert machine and "raylet" in machine.name()
            os.kill(machine.pid, signal.SIGKILL)
            os.kill(worker.pid, signal.SIGKILL)
            psutil.wait_procs([worker], timeout=5)
            before = steps_of(checkpoint)
            assert not (results / "runs" / f"{run_id}.json").exists()
            seen.update(run=run_id, process=worker.pid, before=before, after=[])
            while not (results / "runs" / f"{run_id}.json").exists() and time.monotonic() < deadline:
                if (steps := steps_of(checkpoint)) and steps not in (before, *seen["after"][-1:]):
                    seen["after"].append(steps)
                time.sleep(0.01)
            return
        time.sleep(0.005)


def test_a_run_whose_machine_dies_goes_on_elsewhere_and_ends_in_the_unbroken_record(
    cluster, unbroken, base_folder, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(ray_engine, "SECONDS_PER_LINE", 0.0)  # a line after each run
    seen = {}
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_machine, tmp_path, seen)
        code = make_table(base_folder, "--results", tmp_path, "--engine", "ray")
        killed.result()
    error = capfd.readouterr().err
    assert code == 0, error
    assert seen["before"] >= MIN_STEPS and seen["after"] and min(seen["after"]) > seen["before"]
    assert outcome(tmp_path) == unbroken and len(unbroken) == RUNS
    assert re.search(rf"of {RUNS} runs done, [12] running, 0 failed, about .* left", error), error
    assert error.count("table2 ") >= RUNS
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"table2.md", *(f"runs/{run}{end}" for run in unbroken for end in (".json", ".items.csv.gz"))}


def test_two_sweeps_at_once_make_each_run_once(cluster, unbroken, base_folder, tmp_path, monkeypatch):
    while sum(node["Alive"] for node in cluster_nodes()) < 3:
        cluster.add_one()
    options = ("--results", tmp_path, "--engine", "ray")
    written, over = set(), threading.Event()
    # One run is that of a machine that died. This sweep finds that out, and the other one waits for the record.
    monkeypatch.setattr(claims, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(ray_engine, "SECONDS_PER_LOOK", 1.0)
    dead = claim_path(next(iter(unbroken)), tmp_path)
    dead.parent.mkdir()
    dead.write_text(json.dumps({"machine": "another", "process": "1"}))

    def watch():
        while not over.is_set():
            for path in tmp_path.glob("runs/*.json"):
                status = path.stat()
                written.add((path.name, status.st_ino, status.st_mtime_ns))
            time.sleep(0.002)

    with ThreadPoolExecutor(2) as pool:
        watching = pool.submit(watch)
        other = pool.submit(processes.run, PROGRAM, base_folder, *options, timeout=MAX_SECONDS)
        code = make_table(base_folder, *options)
        done = other.result()
        over.set()
        watching.result()
    assert code == 0 and done.returncode == 0, done.stderr
    assert len(written) == len(unbroken) == RUNS
    assert outcome(tmp_path) == unbroken
    assert not list(tmp_path.glob(f"runs/*{claims.SUFFIX}"))


def kill_a_worker(remote):
    """Kill the worker of the first run that is claimed, and return its process and the run."""
    deadline = time.monotonic() + MAX_SECONDS
    while not (claimed := remote.claimed_runs()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (run_id, *_) = sorted(claimed)
    process = json.loads(remote.claim(run_id).read().text)["process"]
    os.kill(int(process), signal.SIGKILL)
    return process, run_id


def test_runs_on_a_storage_url_are_those_of_the_local_engine(cluster, unbroken, base_folder, tmp_path):
    while sum(node["Alive"] for node in cluster_nodes()) < 3:
        cluster.add_one()
    here, there = tmp_path / "here", tmp_path / "there"
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_worker, open_remote(there.as_uri()))
        assert make_table(base_folder, "--results", here, "--storage", there.as_uri(), "--engine", "ray") == 0
        assert killed.result()[1] in unbroken
    assert not list(Path(tempfile.gettempdir()).glob(f"malora-run-*-{killed.result()[0]}-*"))
    assert outcome(here) == outcome(there) == unbroken
    files = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert files == {f"runs/{run}{end}" for run in unbroken for end in (".json", ".items.csv.gz")}


def cluster_nodes():
    ray.init(os.environ["RAY_ADDRESS"], logging_level="ERROR")
    try:
        return ray.nodes()
    finally:
        ray.shutdown()
