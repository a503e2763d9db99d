"""Seconds per phase of a step."""

import time

import torch

from bench.runtime.timer import PhaseTimer


def test_phases_of_several_steps_are_summed(monkeypatch):
    clock = iter([0.0, 2.0, 3.0, 10.0, 14.0, 15.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer, seconds = PhaseTimer(torch.device("cpu")), {"forward": 1.0}
    for _ in range(2):
        timer.start()  # the time between steps is in no phase
        timer.end_phase("forward")
        timer.end_phase("backward")
    timer.add_to(seconds)
    assert seconds == {"forward": 1.0 + 2.0 + 4.0, "backward": 1.0 + 1.5}
    timer.add_to(seconds)
    assert seconds == {"forward": 7.0, "backward": 2.5}  # nothing is added twice
