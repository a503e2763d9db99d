"""Measurements of a device.

They are the seconds, kernel launches and host synchronisations of steps, and peak rates.

On a GPU time is measured with CUDA events. They are read after all samples, so that timing adds no synchronisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # torch's stubs leave it out
from transformers import PreTrainedModel

from bench.runtime.timer import PhaseTimer
from bench.speed.steps import PhaseCallback, Workload, ignore_phase


def time_steps(step: Callable[[PhaseCallback], Any], samples: int, device: torch.device) -> list[dict[str, float]]:
    """Time consecutive steps without waiting for the device in between.

    Returns:
        Seconds by phase per step, and their sum as "step".
    """
    timers = [PhaseTimer(device) for _ in range(samples)]
    for timer in timers:
        timer.start()
        step(timer.end_phase)
    found: list[dict[str, float]] = []
    for timer in timers:
        seconds: dict[str, float] = {}
        timer.add_to(seconds)
        found.append(seconds | {"step": sum(seconds.values())})
    return found


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, including the device's work that it launched."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# A copy of pageable memory to the host synchronises the stream, so it counts too: as a stream synchronisation.
_SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
                     "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")  # fmt: skip
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_RANGE = "bench.speed: one step"
MAX_KERNELS = 16  # listed in a record
MAX_KERNEL_NAME = 100  # characters; template arguments follow, which do not help to tell kernels apart


def profile_step(step: Callable[[PhaseCallback], Any], device: torch.device) -> dict[str, Any]:
    """Count what one step does, with torch.profiler.

    Returns:
        "kernels": kernels that ran on the device. "launches": launches by the host; a graph is one. "synchronisations":
        times that the host waited for the device. "where": the kernels that took longest, as [name, calls, seconds].
        All are None on a CPU.
    """
    if device.type != "cuda":
        return dict.fromkeys(("kernels", "launches", "synchronisations", "where"))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(_RANGE):
            step(ignore_phase)
        torch.cuda.synchronize()  # outside the range, because it is not part of the step
    events = profile.profiler.kineto_results.events()
    span = next(e for e in events if e.name() == _RANGE and e.device_type() == DeviceType.CPU)
    start, end = span.start_ns(), span.start_ns() + span.duration_ns()
    on_host = [e.name() for e in events if e.device_type() == DeviceType.CPU and start <= e.start_ns() <= end]
    on_device: dict[str, list[int]] = {}  # nanoseconds of each call, by kernel
    for event in events:
        if event.device_type() == DeviceType.CUDA and event.name() != _RANGE:  # the device shows the range as well
            on_device.setdefault(event.name(), []).append(event.duration_ns())
    longest = sorted(on_device.items(), key=lambda item: -sum(item[1]))[:MAX_KERNELS]
    return {
        "kernels": sum(len(d) for name, d in on_device.items() if not name.startswith(("Memcpy", "Memset"))),
        "launches": sum(name.startswith(_LAUNCHES) for name in on_host),
        "synchronisations": sum(name in _SYNCHRONISATIONS for name in on_host),
        "where": [[name[:MAX_KERNEL_NAME], len(d), sum(d) / 1e9] for name, d in longest],
    }


def backbone_flops(base: PreTrainedModel, work: Workload) -> int | None:
    """Return the frozen backbone's matmul operations per step; None for decode.

    Decode is bound by memory.

    Forward, per token: 2 operations per weight of the linear layers, and 2·S·h per layer for causal attention over S
    tokens of width h. The backward pass to the activations costs the linear layers once more and attention twice more.
    The adapter is not counted, so a variant's share of the peak rate compares it with the work that no variant avoids.
    """
    if work.mode == "decode":
        return None
    linear = 2 * sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    attention = 2 * work.length * int(base.config.hidden_size) * int(base.config.num_hidden_layers)
    return work.tokens * (2 * linear + 3 * attention if work.mode == "train" else linear + attention)


def peak_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the device's best rates.

    Returns:
        "matrix_flops_per_second" of a large square matmul, and "copy_bytes_per_second" of a large copy, which counts
        bytes read and bytes written.
    """
    on_gpu = device.type == "cuda"
    size, copied = (8192, 2**30) if on_gpu else (1024, 2**26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "matrix_flops_per_second": 2 * size**3 / _fastest_seconds(lambda: torch.mm(a, b), device),
        "copy_bytes_per_second": 2 * copied / _fastest_seconds(lambda: target.copy_(source), device),
    }


def _fastest_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest of twenty calls.

    A peak rate has to be reached only once.
    """
    for _ in range(3):
        run()

    def step(end_phase: PhaseCallback) -> None:
        run()
        end_phase("run")

    return min(sample["step"] for sample in time_steps(step, 20, device))


def warm_device(device: torch.device, seconds: float) -> None:
    """Keep a GPU busy with large matmuls for some seconds. On a CPU do nothing."""
    if device.type == "cuda":
        a, b = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(100):  # about 20 ms
                torch.mm(a, b)
            torch.cuda.synchronize()
