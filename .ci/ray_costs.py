"""Measure what `--engine ray` costs per run, then simulate 10,000 runs on 100 GPUs. `make ray-costs` runs it.

Measured here: operations on the shared folder, counted while a run is made and while a table is made; Ray's time per
task; the start of a worker. Assumed, and printed as such: what the storage can do, and how often machines fail.
"""

import builtins
import heapq
import io
import math
import os
import pickle
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cli.parser import main as run_bench
from bench.experiments.profiles import PROFILES
from bench.models import tiny
from bench.records import claims, provenance, store
from bench.records.claims import BEAT_SECONDS
from bench.records.files import stale_files
from bench.records.leftovers import remove_failures
from bench.runs import ray_engine, ray_worker
from bench.runs.run import run
from bench.runs.setting import RunSettings, make_run_config
from bench.train.loop import SECONDS_PER_CHECKPOINT
from tasks import Generator

RUNS, GPUS = 10_000, 100
# Assumed: hours of one GPU until it fails, and of one that its owner may take away at any time.
STABLE_HOURS, PREEMPTIBLE_HOURS = 50_000.0, 10.0
SOURCE = Generator((("train", 64), ("validation", 8), ("test", 8)))
CALLS = ("stat", "lstat", "open", "rename", "replace", "unlink", "remove", "link", "utime", "mkdir", "scandir", "fsync")


@contextmanager
def counted(folder: Path) -> Iterator[Counter[str]]:
    """Count the operations of this process on files in a folder, by name; `fsync` has no name and counts always."""
    counts: Counter[str] = Counter()
    prefix, lock = str(folder), threading.Lock()

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *arguments: Any, **options: Any) -> Any:
            if name == "fsync" or (isinstance(first, str | Path) and str(first).startswith(prefix)):
                with lock:
                    counts[name] += 1
            return function(first, *arguments, **options)

        return call

    originals = {name: getattr(os, name) for name in CALLS}
    opened, io_opened = builtins.open, io.open
    for name, function in originals.items():
        setattr(os, name, wrapped(name, function))
    builtins.open = io.open = wrapped("open", opened)  # type: ignore[assignment]
    try:
        yield counts
    finally:
        for name, function in originals.items():
            setattr(os, name, function)
        builtins.open, io.open = opened, io_opened


def make_base(folder: Path) -> Path:
    """Write a base model of random weights, and return its folder."""
    tokenizer = tiny.tokenizer()
    sizes: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes |= {"bos_token_id": None, "vocab_size": len(tokenizer)}
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def total(counts: Counter[str]) -> float:
    """Return the number of operations."""
    return sum(counts.values())


def text(counts: Counter[str]) -> str:
    """Return counts for people: "12 (5 open, 7 stat)"."""
    return f"{total(counts):.0f} ({', '.join(f'{count:g} {name}' for name, count in counts.most_common())})"


def worker_operations(base: Path, folder: Path) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Return the operations of a worker: per run, per checkpoint, and per refreshed claim."""
    profile = replace(PROFILES["tiny"], source=SOURCE, batch_size=8, checkpoint_every=5, warmup_ratio=0.0)
    store.open_folder(folder)
    mark = folder / ".sweep"
    mark.touch()
    found = []
    for steps in (15, 25):  # with three and five checkpoints
        setting = RunSettings(profile, str(base), SOURCE, "intra", folder, max_items=4, max_steps=steps)
        config = make_run_config(setting, "malora", seed=0)
        task = ray_worker.Task(config, setting, 1, None, Path.cwd(), mark, provenance.source_hash())
        with counted(folder) as counts:
            record = ray_worker.make_in_worker(task)
        assert not isinstance(record, str) and record.status == "ok", record
        found.append(counts)
    names = {*found[0], *found[1]}
    per_checkpoint = Counter({name: (found[1][name] - found[0][name]) / 2 for name in names})
    per_run = Counter({name: found[0][name] - 3 * per_checkpoint[name] for name in names})
    claims.BEAT_SECONDS = 0.02
    claim = claims.acquire(claims.claim_path("x", folder))
    assert claim is not None
    with counted(folder) as counts, claim:
        time.sleep(0.5)
        refreshes = counts["utime"]
        refreshed = Counter({name: count / refreshes for name, count in counts.items()})
    return +per_run, +per_checkpoint, Counter({name: round(count, 1) for name, count in refreshed.items()})


def table_operations(base: Path, folder: Path) -> tuple[Counter[str], Counter[str]]:
    """Make tables of 9 and 25 short runs by Ray.

    Returns:
        The driver's operations per run, and per run of a repeated command that finds all records.
    """
    counts: list[Counter[str]] = []
    repeated: list[Counter[str]] = []
    for seeds in (2, 6):
        results = folder / str(seeds)
        command = (
            f"table2 --profile tiny --methods lora,asylora,molora,malora --seeds {seeds} --max-steps 1 --max-items 1"
        )
        words = [*command.split(), "--model", str(base), "--results", str(results), "--engine", "ray"]
        for kept in (counts, repeated):
            errors = io.StringIO()
            with counted(results) as found, redirect_stdout(io.StringIO()), redirect_stderr(errors):
                code = run_bench(words)
            assert code == 0, errors.getvalue()
            kept.append(found)
    runs = 4 * (6 - 2)

    def per_run(pair: list[Counter[str]]) -> Counter[str]:
        return +Counter({name: round((pair[1][name] - pair[0][name]) / runs, 1) for name in pair[1]})

    return per_run(counts), per_run(repeated)


def seconds_to_list(folder: Path) -> float:
    """Return the seconds that a run takes to list `runs` twice, as it does at its end, when all runs are recorded."""
    store.open_folder(folder)
    for number in range(RUNS):
        for ending in (".json", ".items.csv.gz"):
            (folder / "runs" / f"procedural-letters-malora-lr0.0004-s{number}{ending}").touch()
    start = time.perf_counter()
    remove_failures("none", folder)
    stale_files(folder / "runs")
    return time.perf_counter() - start


def ray_seconds(base: Path, folder: Path) -> tuple[float, float, float]:
    """Return Ray's seconds per empty task, the engine's per run without work, and of the first task of a worker."""
    profile = replace(PROFILES["tiny"], source=SOURCE)
    setting = RunSettings(profile, str(base), SOURCE, "intra", folder, max_steps=1, max_items=1)
    store.open_folder(folder)
    configs = [make_run_config(setting, "lora", seed) for seed in range(200)]
    record = run(make_run_config(setting, "base", 0), setting)
    with ray_engine.connected(folder, torch.device("cpu"), None, 1, None) as sweep:
        ray = sweep.ray
        start = time.perf_counter()
        assert "claimed" in ray.get(sweep.remote_task.remote(held_task(configs[0], setting, sweep)))
        first = time.perf_counter() - start
        empty = ray.remote(lambda number: number)
        ray.get([empty.remote(number) for number in range(200)])
        start = time.perf_counter()
        ray.get([empty.remote(number) for number in range(5000)])
        per_task = (time.perf_counter() - start) / 5000
        reference = ray.put(record)
        sweep.remote_task = ray.remote(lambda task: ray.get(reference))
        list(sweep.make([(config, setting) for config in configs[:20]]))
        start = time.perf_counter()
        list(sweep.make([(config, setting) for config in configs[20:]]))
        per_run = (time.perf_counter() - start) / len(configs[20:])
    return per_task, per_run, first


def held_task(config: Any, setting: RunSettings, sweep: Any) -> Any:
    """Return a task whose run another process has, so that it only starts its worker and looks."""
    claims.claim_path(config.id, setting.results).write_text("{}", encoding="utf-8")
    task = ray_worker.Task(config, setting, 1, None, Path.cwd(), sweep.mark.absolute(), provenance.source_hash())
    claims.BEAT_SECONDS = 15.0
    return task


def import_operations() -> str:
    """Return what a worker asks the file system for while it imports the engine, as counted by strace."""
    if not shutil.which("strace"):
        return "strace is missing"
    with tempfile.NamedTemporaryFile(suffix=".txt") as log:
        command = ["strace", "-f", "-c", "-e", "trace=%file", "-o", log.name, sys.executable, "-c"]
        subprocess.run([*command, "import bench.runs.ray_engine"], check=True, capture_output=True)
        lines = [line.split() for line in Path(log.name).read_text(encoding="utf-8").splitlines()]
    found = Counter({words[-1]: int(words[3]) for words in lines if len(words) > 4 and words[3].isdecimal()})
    found.pop("total", None)
    return text(found)


def published() -> tuple[list[float], float, float]:
    """Return of published runs of the profile small: their seconds, and seconds to read and bytes to hold a record."""
    start = time.perf_counter()
    records = store.read_all(store.RESULTS / "small")
    read_seconds = (time.perf_counter() - start) / len(records)
    seconds = [one.train.training_seconds + one.train.seconds.get("evaluation", 0.0) for one in records if one.train]
    return seconds, read_seconds, len(pickle.dumps(records)) / len(records)


def simulate(
    seconds: list[float],
    hours_per_failure: float,
    start_seconds: float,
    driver_seconds: float,
    operations: tuple[float, float, float],
) -> dict[str, float]:
    """Simulate the sweep: GPUs that take the next run, a driver that submits one after the other, and failures.

    A failure costs the work since the last checkpoint, the lease of the claim, and another start.

    Args:
        seconds: Durations of runs, of which each run has one at random.
        hours_per_failure: Mean hours of a GPU between failures.
        start_seconds: Start of a worker.
        driver_seconds: The driver's work per run.
        operations: On the storage, per run, per checkpoint and per refreshed claim.
    """
    rng = random.Random(0)
    free = [0.0] * GPUS
    driver_free = taken = worked = counted_operations = failures = end = 0.0
    for _ in range(RUNS):
        driver_free = max(heapq.heappop(free), driver_free) + driver_seconds
        work = rng.choice(seconds)
        length = start_seconds + work
        while rng.random() < -math.expm1(-length / (3600 * hours_per_failure)):
            failures += 1
            length += rng.uniform(0.0, min(work, SECONDS_PER_CHECKPOINT)) + start_seconds + claims.LEASE_SECONDS
        per_run, per_checkpoint, per_refresh = operations
        counted_operations += per_run + per_checkpoint * (1 + work // SECONDS_PER_CHECKPOINT)
        counted_operations += per_refresh * (length // BEAT_SECONDS)
        taken, worked, end = taken + length, worked + work, max(end, driver_free + length)
        heapq.heappush(free, driver_free + length)
    return {
        "hours": end / 3600,
        "share of the GPUs' time that is work": worked / (end * GPUS),
        "share that is starts and lost work": (taken - worked) / (end * GPUS),
        "share of the driver's time": RUNS * driver_seconds / end,
        "runs, and starts of workers, per second": RUNS / end,
        "storage operations per second": counted_operations / end,
        "failures": failures,
    }


def main() -> None:
    """Print the measurements and the simulation."""
    machine = f"{os.cpu_count()} CPUs, {provenance.device_name(torch.device('cpu'))}, load {os.getloadavg()[0]:.1f}"
    with tempfile.TemporaryDirectory() as temporary, redirect_stderr(io.StringIO()):
        root = Path(temporary)
        base = make_base(root / "base")
        per_task, per_run, first = ray_seconds(base, root / "ray")
        worker = worker_operations(base, root / "worker")
        driver, repeated = table_operations(base, root / "table")
        listing = seconds_to_list(root / "many")
    seconds, read_seconds, record_bytes = published()
    print(f"machine: {machine} at the start")
    print(f"Ray, empty task: {1e3 * per_task:.2f} ms; the engine, run without work: {1e3 * per_run:.1f} ms")
    print(f"first task of a worker, with its imports: {first:.1f} s")
    print(f"file operations of a worker's imports: {import_operations()}")
    for name, counts in zip(("run", "checkpoint", "refreshed claim"), worker, strict=True):
        print(f"worker, operations per {name}: {text(counts)}")
    print(f"driver, operations per run: {text(driver)}; of a repeated command: {text(repeated)}")
    print(f"two listings of {2 * RUNS:,} files at the end of a run: {1e3 * listing:.0f} ms")
    print(f"a published record of small: {1e3 * read_seconds:.1f} ms to read, {record_bytes / 1e3:.0f} kB")
    operations = total(worker[0]) + total(driver), total(worker[1]), total(worker[2])
    for name, factor, hours in (
        ("as published", 1, STABLE_HOURS),
        ("ten times shorter", 10, STABLE_HOURS),
        ("as published, preemptible GPUs", 1, PREEMPTIBLE_HOURS),
    ):
        drawn = [one / factor for one in seconds]
        print(f"\n{RUNS:,} runs on {GPUS} GPUs, {name}: a median of {statistics.median(drawn):.1f} s per run")
        for what, value in simulate(drawn, hours, first, per_run, operations).items():
            print(f"  {what}: {value:.3g}")


if __name__ == "__main__":
    main()
