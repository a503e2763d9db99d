"""Clocks, counters and peak rates of a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from transformers import PreTrainedModel

from bench.runtime.timer import PhaseTimer
from bench.speed.steps import PhaseCallback, Workload


def time_steps(step: Callable[[PhaseCallback], Any], samples: int, device: torch.device) -> list[dict[str, float]]:
    """Seconds by part, and of the whole as "step", of steps that follow each other without a wait."""
    watches = [PhaseTimer(device) for _ in range(samples)]
    for watch in watches:
        watch.start()
        step(watch.end_phase)
    found: list[dict[str, float]] = []
    for watch in watches:
        seconds: dict[str, float] = {}
        watch.add_to(seconds)
        found.append(seconds | {"step": sum(seconds.values())})
    return found


_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
          "cuCtxSynchronize", "cuEventSynchronize")  # fmt: skip
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_RANGE = "bench.speed: one step"
LONGEST_KERNELS, KERNEL_NAME = 16, 100  # how many are named in a record, and how much of a name says what it is


def count(step: Callable[[PhaseCallback], Any], device: torch.device) -> dict[str, Any]:
    """Kernels that ran in a step, launches by the host (a graph is one), and times that the host waited.

    "where" has the kernels that took longest, as [name, calls, seconds]. All are None on a CPU. A copy to the host of
    pageable memory is a wait too: the runtime synchronises the stream for it.
    """
    if device.type != "cuda":
        return dict.fromkeys(("kernels", "launches", "synchronisations", "where"))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(_RANGE):
            step(lambda part: None)
        torch.cuda.synchronize()  # outside the range: the profiler's own wait is not the step's
    events = profile.profiler.kineto_results.events()
    span = next(e for e in events if e.name() == _RANGE and e.device_type() == DeviceType.CPU)
    start, end = span.start_ns(), span.start_ns() + span.duration_ns()
    on_host = [e.name() for e in events if e.device_type() == DeviceType.CPU and start <= e.start_ns() <= end]
    on_device: dict[str, list[int]] = {}
    for event in events:
        if event.device_type() == DeviceType.CUDA and event.name() != _RANGE:  # the range is shown on the device too
            on_device.setdefault(event.name(), []).append(event.duration_ns())
    longest = sorted(on_device.items(), key=lambda item: -sum(item[1]))[:LONGEST_KERNELS]
    return {
        "kernels": sum(len(d) for name, d in on_device.items() if not name.startswith(("Memcpy", "Memset"))),
        "launches": sum(name.startswith(_LAUNCHES) for name in on_host),
        "synchronisations": sum(name in _WAITS for name in on_host),
        "where": [[name[:KERNEL_NAME], len(d), sum(d) / 1e9] for name, d in longest],
    }


def backbone_flops(base: PreTrainedModel, work: Workload) -> int | None:
    """Matrix operations of the frozen backbone in a step; None for decode, which is bound by memory.

    A token costs 2 operations a weight of the linear maps, and 2·S·h a layer for causal attention over S tokens of
    width h. A backward pass down to the activations costs the first once more and the second twice. What an adapter
    adds is not counted: a row's share of the device's rate says how near it is to the work that cannot be left out.
    """
    if work.mode == "decode":
        return None
    linear = 2 * sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    attention = 2 * work.length * base.config.hidden_size * base.config.num_hidden_layers
    return work.tokens * (2 * linear + 3 * attention if work.mode == "train" else linear + attention)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device can do at best: a large square product, and a large copy, counting what is read and written."""
    on_gpu = device.type == "cuda"
    size, copied = (8192, 2**30) if on_gpu else (1024, 2**26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "matrix_flops_per_second": 2 * size**3 / _best(lambda: torch.mm(a, b), device),
        "copy_bytes_per_second": 2 * copied / _best(lambda: target.copy_(source), device),
    }


def warm_device(device: torch.device, seconds: float) -> None:
    """Has a GPU make products for so long; nothing elsewhere."""
    if device.type == "cuda":
        a, b = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(100):  # some 20 ms
                torch.mm(a, b)
            torch.cuda.synchronize()


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the fastest of twenty: a ceiling is what was reached once."""
    for _ in range(3):
        run()

    def step(end_phase: PhaseCallback) -> None:
        run()
        end_phase("run")

    return min(sample["step"] for sample in time_steps(step, 20, device))


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the call and what it launched were done."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
