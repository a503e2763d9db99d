"""Time the phases of a step without waiting for the device."""

from __future__ import annotations

import time
from typing import Any

import torch


class PhaseTimer:
    """Seconds by part of a step, without making the host wait: on a GPU, events that are read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str | None, Any]] = []

    def start(self) -> None:
        self._mark(None)

    def end_phase(self, part: str) -> None:
        """What ran since the last mark was `part`."""
        self._mark(part)

    def _mark(self, part: str | None) -> None:
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def add_to(self, seconds: dict[str, float]) -> None:
        """Add what was measured since the last call."""
        if self.on_gpu:
            torch.cuda.synchronize()
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            if part is not None:
                passed = before.elapsed_time(now) / 1000 if self.on_gpu else now - before
                seconds[part] = seconds.get(part, 0.0) + passed
        self.marks.clear()
