"""Read a GPU's clock, power and temperature while it works.

A GPU at its power limit lowers its clock, so these readings help to explain a step's time.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable

import torch

PERIOD_SECONDS = 0.2  # between samples; the sensors themselves update only every few of these
READINGS: dict[str, Callable[[torch.device], float]] = {
    "clock_mhz": torch.cuda.clock_rate,  # of the multiprocessors
    "watts": lambda device: torch.cuda.power_draw(device) / 1000,
    "celsius": torch.cuda.temperature,
}


class Sensors:
    """Samples of a GPU's sensors, taken inside `with` in a thread.

    Without a GPU or `nvidia-ml-py` there are no samples.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: dict[str, list[float]] = {name: [] for name in READINGS}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Sensors:
        if self.device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def medians(self) -> dict[str, float] | None:
        """Return the median of each reading, or None if there are no samples."""
        if not all(self.samples.values()):
            return None
        return {name: statistics.median(values) for name, values in self.samples.items()}

    def _read(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS):
            try:
                now = {name: read(self.device) for name, read in READINGS.items()}
            except Exception:  # the driver's library may raise anything; a record can do without sensors
                return
            for name, value in now.items():
                self.samples[name].append(value)
