"""What a GPU's sensors say while it works. A step is as fast as the clock that the board's power leaves it."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable

import torch

PERIOD = 0.2  # seconds between samples; the sensors themselves are slower than a few of these
READINGS: dict[str, Callable[[torch.device], float]] = {
    "clock_mhz": torch.cuda.clock_rate,  # of the multiprocessors
    "watts": lambda device: torch.cuda.power_draw(device) / 1000,
    "celsius": torch.cuda.temperature,
}


class Sensors:
    """Reads a GPU's sensors inside `with`, in a thread. On a CPU, and without `nvidia-ml-py`, there are none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: dict[str, list[float]] = {name: [] for name in READINGS}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Sensors:
        if self.device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def medians(self) -> dict[str, float] | None:
        """By reading; None if there is none."""
        if not all(self.samples.values()):
            return None
        return {name: statistics.median(values) for name, values in self.samples.items()}

    def _read(self) -> None:
        while not self._done.wait(PERIOD):
            try:
                now = {name: read(self.device) for name, read in READINGS.items()}
            except Exception:  # whatever a driver's library raises: a record does without
                return
            for name, value in now.items():
                self.samples[name].append(value)
