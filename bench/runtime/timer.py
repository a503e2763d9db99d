"""Time the phases of a step without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Mark = torch.cuda.Event | float  # a GPU event, or the host's clock in seconds
_make_event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # its arguments are untyped in torch


class PhaseTimer:
    """A timer for the phases of a step.

    On a GPU it records CUDA events, which are read at the end, so the host never waits in between.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, Mark]] = []

    def start(self) -> None:
        """Begin the first phase."""
        self._marks.append((None, self._now()))

    def end_phase(self, phase: str) -> None:
        """End a phase, which began at the previous mark, and begin the next one."""
        self._marks.append((phase, self._now()))

    def add_to(self, seconds: dict[str, float]) -> None:
        """Add the seconds of each phase since the last call, after waiting for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        for (_, before), (phase, now) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                seconds[phase] = seconds.get(phase, 0.0) + _seconds_between(before, now)
        self._marks.clear()

    def _now(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = _make_event(enable_timing=True)
        event.record()
        return event


def _seconds_between(before: Mark, now: Mark) -> float:
    if isinstance(before, float) or isinstance(now, float):
        assert isinstance(before, float) and isinstance(now, float), "marks of one timer have one type"
        return now - before
    milliseconds: float = before.elapsed_time(now)
    return milliseconds / 1000
