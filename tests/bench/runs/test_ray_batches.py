"""What the driver and a worker of the Ray engine decide, without Ray."""

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch

from bench.errors import UserError
from bench.records import provenance, store
from bench.records.claims import acquire, claim_path
from bench.records.remote import open_remote
from bench.runs import ray_engine, ray_worker
from bench.runs.ray_engine import RaySweep
from bench.runs.ray_worker import CLAIMED, NO_MEMORY, Task, make_in_worker
from bench.runs.run import find_record, run
from bench.runs.setting import make_run_config

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
NODES = ({"CPU": 8, "GPU": 2}, {"CPU": 2, "GPU": 1}, {"CPU": 3})


class Error(Exception):
    pass


class TaskError(Error):
    def __init__(self, cause):
        super().__init__(cause)
        self.cause = cause


class FakeRay:
    """Runs a task when its result is asked for; `outcomes` has functions or exceptions to take the tasks' place."""

    exceptions = SimpleNamespace(RayError=Error, RayTaskError=TaskError)

    def __init__(self, *outcomes, nodes=({"CPU": 1},)):
        self.outcomes, self.options, self.kept, self.cancelled = list(outcomes), [], [], []
        self.nodes = lambda: [{"Alive": True, "Resources": node} for node in nodes]

    def remote(self, **kept):
        self.kept.append(kept)

        def options(function, **options):
            self.options.append(options)
            return SimpleNamespace(remote=lambda task: (options["name"], lambda: function(task)))

        return lambda function: SimpleNamespace(options=partial(options, function))

    def wait(self, references, timeout):
        return references[:1], references[1:]

    def get(self, reference):
        outcome = self.outcomes.pop(0) if self.outcomes else reference[1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome()

    def cancel(self, reference, force):
        self.cancelled.append(reference[0])


@pytest.fixture
def mark(setting):
    store.open_folder(setting.results)
    mark = setting.results / ".sweep"
    mark.touch()
    return mark


@pytest.fixture
def runs(setting):
    setting = replace(setting, max_steps=2, max_items=2)
    return [(make_run_config(setting, method, seed=0), setting) for method in ("base", "lora")]


def sweep(ray, mark, **options):
    return RaySweep(ray, mark, **{"gpus_per_run": 0.0, "cpus_per_run": 1, "max_runs": None} | options)


@pytest.mark.parametrize(
    "gpus_per_run, max_runs, places, concurrent",
    [(1.0, None, 3, 1), (0.25, None, 8 + 2, 4), (0.3, None, 6 + 2, 3), (0.25, 5, 5, 4), (0.0, None, 13, 8)],
)
def test_a_run_has_a_part_of_one_gpu_and_cpus(mark, gpus_per_run, max_runs, places, concurrent):
    made = sweep(FakeRay(nodes=NODES), mark, gpus_per_run=gpus_per_run, max_runs=max_runs)
    assert (made.places(), made.concurrent_runs()) == (places, concurrent)


def test_missing_runs_are_made_and_a_run_without_memory_gets_a_whole_gpu(runs, mark):
    ray = FakeRay(lambda: NO_MEMORY, nodes=({"CPU": 4, "GPU": 1},))
    made = list(sweep(ray, mark, gpus_per_run=0.5).make([*runs, runs[0]]))
    assert [record.config.method for record in made] == ["lora", "base"]
    assert [options["num_gpus"] for options in ray.options] == [0.5, 0.5, 1]
    assert [record.provenance.concurrent_runs for record in made] == [2, 1]
    assert ray.kept == [{"max_retries": ray_engine.MAX_LOST_WORKERS, "max_calls": 1}] and ray.cancelled == []


def test_a_run_that_another_sweep_has_is_waited_for_and_made_if_it_is_given_up(runs, mark, monkeypatch):
    (base, setting), (lora, _) = runs
    held = {config.id: acquire(claim_path(config.id, setting.results)) for config, _ in runs}
    assert make_in_worker(task_of(runs[0], mark)) == CLAIMED

    def other_sweep(seconds):
        if base.id in held:
            run(base, setting)
            with held.pop(base.id):
                pass
        elif lora.id in held:
            with held.pop(lora.id):
                pass

    monkeypatch.setattr(ray_engine.time, "sleep", other_sweep)
    monkeypatch.setattr(ray_engine, "SECONDS_PER_LOOK", 0.0)
    ray = FakeRay()
    made = list(sweep(ray, mark).make(runs))
    assert [record.config.method for record in made] == ["base", "lora"] and len(ray.options) == 1


def test_a_run_that_loses_its_worker_too_often_has_failed(runs, mark):
    (record,) = sweep(FakeRay(Error("the worker died\nlong text")), mark).make(runs[:1])
    assert record.status == "failed" and "4 times" in record.error and ".failed-" in record.path.name
    assert find_record(*runs[0]) is None


def test_an_error_of_the_user_in_a_worker_ends_the_sweep(runs, mark):
    ray = FakeRay(TaskError(UserError("no such file")))
    with pytest.raises(UserError, match="no such file"):
        list(sweep(ray, mark).make(runs))
    assert ray.cancelled == [runs[1][0].id]


def test_runs_on_object_storage_come_to_the_folder_of_the_driver(runs, mark, monkeypatch):
    monkeypatch.chdir(os.getcwd())
    remote = open_remote(f"memory://{uuid4().hex}/results")
    with pytest.raises(UserError, match="does not see memory://"):
        list(sweep(FakeRay(), mark, remote=remote).make(runs))
    remote.write(mark.name, b"")
    (base, setting), (lora, _) = runs
    elsewhere = replace(setting, results=mark.parent / "elsewhere")
    other = acquire(remote.claim(base.id))

    def other_sweep(seconds):
        remote.push_record(run(base, elsewhere).path)
        with other:
            pass

    monkeypatch.setattr(ray_engine.time, "sleep", other_sweep)
    monkeypatch.setattr(ray_engine, "SECONDS_PER_LOOK", 0.0)
    ray = FakeRay()
    made = list(sweep(ray, mark, remote=remote).make(runs))
    assert [record.config.method for record in made] == ["lora", "base"] and len(ray.options) == 1
    assert {record.path.parent for record in made[:1]} == {setting.results / "runs"}
    assert store.read_all(setting.results) == sorted(made, key=lambda record: record.id)
    assert remote.claimed_runs() == set() and len(remote.names("runs", "*.json")) == 2
    (failed,) = sweep(FakeRay(Error("the worker died")), mark, remote=remote).make([(lora.replace(seed=1), setting)])
    assert failed.status == "failed" and remote.names("runs", "*.failed-*.json") == [f"runs/{failed.path.name}"]


@pytest.mark.parametrize(
    "address, reason", [("127.0.0.1:1", "no Ray cluster listens"), ("ray://head:10001", "is a URL")]
)
def test_a_cluster_that_does_not_answer(address, reason):
    with pytest.raises(UserError, match=reason):
        ray_engine._require_answer(address)


def task_of(one, place, **changes):
    task = Task(*one, 1, None, place.parent, place, provenance.source_hash())
    return replace(task, **changes)


def test_a_worker_refuses_to_make_another_run_than_the_driver_asked_for(runs, mark, monkeypatch):
    monkeypatch.chdir(os.getcwd())  # the worker changes it
    config, setting = runs[1]
    for changes, reason in (
        ({"folder": mark.parent / "none"}, "storage that they share"),
        ({"mark": mark.parent / "none"}, "storage that they share"),
        ({"sources": "0"}, "other sources"),
        ({"config": config.replace(model_hash="0", device_type="other")}, "its model_hash, device_type differ"),
    ):
        with pytest.raises(UserError, match=reason):
            make_in_worker(task_of((config, setting), mark, **changes))
    assert not list(setting.results.glob("runs/*"))


def test_a_worker_without_memory_gives_up_its_claim(runs, mark, monkeypatch):
    def crowded(*args, **options):
        raise torch.OutOfMemoryError("60 GiB wanted")

    monkeypatch.chdir(os.getcwd())
    monkeypatch.setattr(ray_worker, "run", crowded)
    assert make_in_worker(task_of(runs[1], mark)) == NO_MEMORY
    assert not list(mark.parent.glob("runs/*"))
