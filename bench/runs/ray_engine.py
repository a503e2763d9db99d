"""Make runs as Ray tasks, on this machine or on a cluster whose machines share the results.

They share a folder that all machines mount, or a `RemoteFolder` behind a URL.

1. The driver, which is the command, submits about twice as many runs as the cluster has places for.
2. A task claims its run (`bench.records.claims`) and makes it as `bench.runs.run.run` does, with records and
   checkpoints in the shared folder, or as `bench.runs.remote_run.run_remotely` does. If another sweep has the run, the
   task returns at once. The driver then waits for the record, and submits the run again if the claim is given up or
   expires.
3. If a worker or its machine dies, Ray repeats the task elsewhere. The new task takes over the claim and continues
   from the checkpoint.

The machines need the same sources in the same folder, the same base model and the same data. Each task checks this
(`bench.runs.ray_worker`).
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.errors import UserError
from bench.records import provenance, store
from bench.records.claims import ClaimState, ClaimWatch, claimed_runs
from bench.records.files import temporary_path
from bench.records.leftovers import remove_failures
from bench.records.remote import RemoteFolder, place_of_claim
from bench.records.schema import Record, RunConfig
from bench.runs.plan import Runs
from bench.runs.pool import split_recorded
from bench.runs.ray_worker import NO_MEMORY, Task, make_in_worker
from bench.runs.run import find_record
from bench.runs.setting import RunSettings
from bench.runs.work import duration

MAX_LOST_WORKERS = 3  # of one run; a run that kills its worker every time must end
SUBMITTED_PER_PLACE = 2  # so that a place that gets free has its next run, and other sweeps find runs to claim
SECONDS_PER_LOOK = 10.0  # at runs that other sweeps have: each takes the storage an operation
SECONDS_PER_LINE = 30.0
OBJECT_STORE_BYTES = 100 * 2**20  # of a local Ray; tasks exchange records only, and Ray takes 30% of the memory itself
MAX_CONNECT_SECONDS = 10.0


def require_ray() -> None:
    """Check that Ray is installed.

    Raises:
        UserError: It is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: pip install --editable '.[ray]'.")


@dataclass
class RaySweep:
    """A connection to Ray; `connected` makes it.

    Attributes:
        ray: The module.
        mark: As in `Task`.
        gpus_per_run: GPUs of a run, such as 0.25; 0 on a CPU.
        cpus_per_run: CPUs of a run, as many as it has threads.
        max_runs: Runs at a time; None for as many as the cluster has places for.
        remote: The folder that all machines reach; None if they mount the folder of results.
    """

    ray: Any
    mark: Path
    gpus_per_run: float
    cpus_per_run: int
    max_runs: int | None
    remote: RemoteFolder | None = None

    @cached_property
    def remote_task(self) -> Any:
        """The remote function; Ray sends each new one to the cluster, so there is one."""
        # A process keeps the GPU that it first used, and its next task may get another one.
        calls = {"max_calls": 1} if self.gpus_per_run else {}
        return self.ray.remote(max_retries=MAX_LOST_WORKERS, **calls)(make_in_worker)

    def places(self) -> int:
        """Return how many runs the cluster has places for now; at least 1."""
        return min(self.max_runs or sys.maxsize, max(1, sum(map(self._places_of, self.ray.nodes()))))

    def _places_of(self, node: dict[str, Any]) -> int:
        if not node["Alive"]:
            return 0
        cpus = int(node["Resources"].get("CPU", 0) / self.cpus_per_run)
        # Parts of two GPUs are not a place.
        return min(cpus, int(node["Resources"].get("GPU", 0)) * self._per_gpu()) if self.gpus_per_run else cpus

    def _per_gpu(self) -> int:
        return int(1 / self.gpus_per_run + 1e-6)

    def concurrent_runs(self) -> int:
        """Return how many runs may share a GPU, or the CPU of a machine."""
        if self.gpus_per_run:
            return self._per_gpu()
        return max(1, min(self.places(), max(map(self._places_of, self.ray.nodes()))))

    def make(self, runs: Runs) -> Generator[Record]:
        """Make the runs that have no record yet, and yield all records, each as soon as it is there.

        Raises:
            UserError: A run cannot be made as the user asked for it, or a machine of the cluster differs.
        """
        done, missing = split_recorded(runs)
        yield from done
        different = {config.id: (config, setting) for config, setting in missing}
        yield from _Batch(self, different, len(done)).make()


@contextmanager
def connected(
    results: Path,
    device: torch.device,
    gpus_per_run: float | None,
    cpus_per_run: int,
    max_runs: int | None,
    remote: RemoteFolder | None = None,
) -> Iterator[RaySweep]:
    """Connect to the cluster of `RAY_ADDRESS`, or start Ray on this machine for the `with` block.

    Args:
        results: Folder of results, which exists.
        device: Kind of device that the runs need; this machine must have one.
        gpus_per_run: GPUs of a run; None for one on a GPU, and none on a CPU.
        cpus_per_run: CPUs of a run.
        max_runs: Runs at a time; None for as many as the cluster has places for.
        remote: The folder that all machines reach; None if they mount the folder of results.

    Raises:
        UserError: There is no such cluster, or it has no place for any run.
    """
    ray = _import_ray()
    address = os.environ.get("RAY_ADDRESS") or "local"
    _require_answer(address)
    is_local = address == "local"
    options = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if is_local else {}
    gpus = (1.0 if gpus_per_run is None else gpus_per_run) if device.type == "cuda" else 0.0
    mark = temporary_path(results / "sweep")
    try:
        ray.init(address, logging_level="ERROR", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"Ray at {address} does not answer ({reason}); see RAY_ADDRESS.") from error
    try:
        if remote:
            remote.write(mark.name, b"")
        mark.touch()
        yield RaySweep(ray, mark, gpus, cpus_per_run, max_runs, remote)
    finally:
        mark.unlink(missing_ok=True)
        if remote:
            with suppress(OSError):  # the storage does not answer, and the error that says so is more important
                remote.remove(mark.name)
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Check that a cluster listens at `HOST:PORT`; Ray itself would try for ten minutes.

    Raises:
        UserError: It does not, or the address is that of another protocol.
    """
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS {address} is a URL; start the command on a machine of the cluster, with HOST:PORT."
        )
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), MAX_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"no Ray cluster listens at RAY_ADDRESS {address} ({error}).") from error


def _import_ray() -> Any:
    """Import Ray without its usage statistics."""
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines of progress differ in their numbers only
    import ray

    return ray


@dataclass
class _Batch:
    """Runs that need no result of each other.

    Attributes:
        sweep: The connection.
        runs: The runs to make, by id.
        done: Runs that were recorded before.
    """

    sweep: RaySweep
    runs: dict[str, tuple[RunConfig, RunSettings]]
    done: int
    failed: int = 0
    queue: deque[str] = field(default_factory=deque)  # to be submitted
    submitted: dict[Any, str] = field(default_factory=dict)  # by the reference of the task
    elsewhere: list[str] = field(default_factory=list)  # claimed by other sweeps
    alone: set[str] = field(default_factory=set)  # found no memory next to others
    watch: ClaimWatch = field(default_factory=ClaimWatch)
    last_look: float = 0.0

    def make(self) -> Generator[Record]:
        """Make the runs and yield their records; tasks are cancelled if it is left early."""
        ray = self.sweep.ray
        self.queue.extend(self.runs)
        start = last_line = time.monotonic()
        before, total = self.done, self.done + len(self.runs)
        try:
            while self.queue or self.submitted or self.elsewhere:
                for one in self._look_and_submit():
                    yield self._count(one)
                if self.submitted:
                    ready, _ = ray.wait(list(self.submitted), timeout=SECONDS_PER_LOOK)
                    for reference in ready:
                        if record := self._result(reference):
                            yield self._count(record)
                elif self.elsewhere:
                    time.sleep(SECONDS_PER_LOOK)
                if time.monotonic() - last_line >= SECONDS_PER_LINE:
                    last_line = time.monotonic()
                    print(self._progress(total, before, last_line - start), file=sys.stderr, flush=True)
        finally:
            for reference in self.submitted:
                ray.cancel(reference, force=True)

    def _look_and_submit(self) -> Iterator[Record]:
        """Submit runs while places are free; yield records that other sweeps have written meanwhile."""
        if time.monotonic() - self.last_look >= SECONDS_PER_LOOK:
            self.last_look = time.monotonic()
            elsewhere, self.elsewhere = self.elsewhere, []
            for run_id in elsewhere:
                yield from self._look(run_id, is_new=False)
        limit = self.sweep.places() * SUBMITTED_PER_PLACE if self.sweep.max_runs is None else self.sweep.places()
        while self.queue and len(self.submitted) < limit:
            yield from self._look(self.queue.popleft(), is_new=True)

    def _look(self, run_id: str, is_new: bool) -> Iterator[Record]:
        """Submit a run, unless another sweep has recorded or claimed it."""
        config, setting = self.runs[run_id]
        claim, is_dead = self.watch.look(place_of_claim(run_id, setting.results, self.sweep.remote))
        if claim and not is_dead:
            self.elsewhere.append(run_id)
        elif found := self._find(config, setting):
            yield found
        elif is_new or claim:
            self._submit(run_id, claim)
        else:
            self.queue.append(run_id)  # the other sweep gave it up

    def _find(self, config: RunConfig, setting: RunSettings) -> Record | None:
        """Return the run's record, if there is one."""
        if self.sweep.remote:
            self.sweep.remote.pull_record(f"runs/{config.id}.json", setting.results)
        return find_record(config, setting)

    def _submit(self, run_id: str, expired: ClaimState | None) -> None:
        config, setting = self.runs[run_id]
        sweep = self.sweep
        is_alone = run_id in self.alone
        jobs = 1 if is_alone else sweep.concurrent_runs()
        sources = provenance.source_hash()
        task = Task(config, setting, jobs, expired, Path.cwd(), sweep.mark.absolute(), sources, sweep.remote)
        gpus = 1 if is_alone else sweep.gpus_per_run
        remote = sweep.remote_task.options(num_cpus=sweep.cpus_per_run, num_gpus=gpus, name=run_id)
        self.submitted[remote.remote(task)] = run_id

    def _result(self, reference: Any) -> Record | None:
        """Return the record of a finished task; None if its run is not made yet.

        Raises:
            UserError: Of the run.
        """
        run_id = self.submitted.pop(reference)
        config, setting = self.runs[run_id]
        exceptions = self.sweep.ray.exceptions
        try:
            result = self.sweep.ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, Exception) else error from None
        except exceptions.RayError as error:  # the worker died too often
            reason = f"its worker process died {MAX_LOST_WORKERS + 1} times ({type(error).__name__}: {error})"
            made_by = provenance.provenance(setting.device, 1)
            record = Record(config=config, status="failed", error=reason, provenance=made_by)
            path = store.write(record, setting.results)
            if self.sweep.remote:
                self.sweep.remote.push_record(path)
            return record
        if isinstance(result, Record):
            return self._fetched(result, setting) if self.sweep.remote else result
        if result == NO_MEMORY:
            self.alone.add(run_id)
            self.queue.append(run_id)
        else:
            self.elsewhere.append(run_id)
        return None

    def _fetched(self, record: Record, setting: RunSettings) -> Record:
        """Pull a record that a task has made, and return it with its path on this machine."""
        assert self.sweep.remote and record.path
        self.sweep.remote.pull_record(f"runs/{record.path.name}", setting.results)
        record.path = setting.results / "runs" / record.path.name
        if record.status != "failed":
            remove_failures(record.id, setting.results)
        return record

    def _count(self, record: Record) -> Record:
        self.done += 1
        self.failed += record.status == "failed"
        return record

    def _progress(self, total: int, before: int, seconds: float) -> str:
        """Return a line: runs that are done, running and failed, and the time left at the speed so far."""
        unfinished = {*self.queue, *self.submitted.values(), *self.elsewhere}
        results = next(iter(self.runs.values()))[1].results
        remote = self.sweep.remote
        running = len((remote.claimed_runs() if remote else claimed_runs(results)) & unfinished)
        new = self.done - before
        left = f"about {duration(seconds / new * (total - self.done))} left" if new else "time left unknown"
        return f"{self.done} of {total} runs done, {running} running, {self.failed} failed, {left}"
