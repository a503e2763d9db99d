"""Interleaved rounds: every row is timed in turn on an equally hot device.

A row that cannot run gives a reason.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from bench.speed import rounds, sensors
from bench.speed.steps import Workload

CPU = torch.device("cpu")


class Fake:
    """A row that logs its sessions, and fails on demand."""

    work = Workload("train", batch=4, length=8, tokens=64, dropout=0.0, vocab_size=8)

    def __init__(self, name, log, fits=4, error=None):
        self.about, self.log, self.batch, self.fits, self.error = {"name": name}, log, 4, fits, error

    @contextmanager
    def session(self):
        self.log.append(self.about["name"])
        if self.error:
            raise self.error
        if self.batch > self.fits:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nmore")
        yield lambda end_phase: end_phase("forward")


def test_rounds_alternate_their_order():
    log = []
    rounds.measure([Fake(name, log) for name in "abc"], 3, CPU)
    assert log == list("abcabccbaabc")  # the first pass, and three rounds


def test_a_measurement_begins_with_a_warm_device_and_keeps_the_sensors_medians(monkeypatch):
    class Read(sensors.Sensors):
        def medians(self):
            return {"watts": 700.0}

    monkeypatch.setattr(rounds, "Sensors", Read)
    monkeypatch.setattr(rounds, "warm_device", lambda device, seconds: log.append(seconds))
    (found,), _ = rounds.measure([Fake("a", log := [])], 2, CPU)
    assert log == ["a", *["a", rounds.DEVICE_WARM_SECONDS] * 2] and found["sensors"] == {"watts": [700.0, 700.0]}


def test_no_round_is_started_that_would_end_too_late():
    found, done = rounds.measure([Fake("a", log := [])], 5, CPU, seconds=0)
    assert done == 1 and log == ["a"] * 2 and found[0]["seconds"]["step"]


def test_every_round_times_steps_after_as_many_untimed_ones(monkeypatch):
    monkeypatch.setattr(rounds, "ignore_phase", lambda phase: warm_ups.append(phase))
    warm_ups: list[str] = []
    (found,), _ = rounds.measure([Fake("short", [])], 2, CPU)
    assert len(warm_ups) == 2 + 2 * rounds.MAX_STEPS  # two in the first pass
    assert len(found["seconds"]["step"]) == 2 * rounds.MAX_STEPS


def test_training_that_does_not_fit_is_tried_with_smaller_micro_batches():
    (half, none, broken, fine), _ = rounds.measure(
        [
            Fake("half", [], fits=2),
            Fake("none", [], fits=0),
            Fake("broken", [], error=ValueError("why")),
            Fake("x", []),
        ],
        1,
        CPU,
    )
    assert (half["status"], half["batch"]) == ("ok", 2) and "micro-batches of 2" in half["reason"]
    assert (none["status"], none["reason"]) == ("oom", "Tried to allocate 2 GiB.")
    assert (broken["status"], broken["reason"]) == ("failed", "ValueError: why")
    assert fine["status"] == "ok" and fine["seconds"]["step"]


@pytest.mark.parametrize("run, passes", [("eager", 1), ("compiled", 2)])
def test_a_slow_row_gets_two_samples_and_is_warm_once_it_has_run_or_been_compiled(run, passes, monkeypatch):
    monkeypatch.setattr(rounds, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "ignore_phase", lambda phase: warm_ups.append(phase))
    row, warm_ups = Fake("slow", log := []), []
    row.about["run"] = run
    (slow,), _ = rounds.measure([row], 5, CPU)
    assert log == ["slow"] * 3 and len(slow["seconds"]["step"]) >= 2
    assert len(warm_ups) == passes and slow["warm_seconds"] > 0


def test_a_row_that_compiles_in_its_first_step_is_not_slow(monkeypatch):
    """On a GPU the profiled step tells how long a warm step takes."""
    taken = iter([14.0, 0.5, 20.0])
    monkeypatch.setattr(rounds, "profile_step", lambda step, device: step(None) or {})

    def wall_seconds(run, device):
        run()
        return next(taken)

    monkeypatch.setattr(rounds, "wall_seconds", wall_seconds)

    class CompiledRow:
        about, session = {"run": "eager"}, staticmethod(lambda: nullcontext(lambda end_phase: None))

    result = {}
    rounds._warm_up(CompiledRow(), result, torch.device("cuda"))
    assert result == {"first_seconds": 14.0, "warm_seconds": 0.5, "build_seconds": 20.0}
