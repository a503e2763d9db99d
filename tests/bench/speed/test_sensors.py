"""A GPU's sensors are read in a thread while a row runs."""

import statistics
import time

import torch

from bench.speed import sensors


def test_the_devices_sensors_are_read_while_a_row_runs(monkeypatch):
    monkeypatch.setattr(sensors, "PERIOD_SECONDS", 0.001)
    monkeypatch.setattr(sensors, "READINGS", {"clock_mhz": lambda device: 1980, "watts": lambda device: next(watts)})
    watts, gpu = iter(range(10**9)), torch.device("cuda")
    with sensors.Sensors(gpu) as read:
        while len(read.samples["watts"]) < 3:
            time.sleep(0.001)
    medians, samples = read.medians(), list(read.samples["watts"])
    assert medians["clock_mhz"] == 1980 and medians["watts"] == statistics.median(samples)
    time.sleep(0.01)
    assert read.samples["watts"] == samples  # it has stopped

    def unreadable(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(sensors, "READINGS", {"clock_mhz": unreadable})
    for device in (gpu, torch.device("cpu")):
        with sensors.Sensors(device) as read:
            time.sleep(0.01)
        assert read.medians() is None
