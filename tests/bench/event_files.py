"""Compare TensorBoard's event files with records."""

import pytest


def read_events(results, record):
    """Return the scalars of a run's event files: values by name and step, each logged once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(results / "tracking" / "tensorboard" / record.id))
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    by_step = {name: {event.step: event.value for event in found} for name, found in scalars.items()}
    assert all(len(by_step[name]) == len(found) for name, found in scalars.items())
    return by_step


def check_events(results, record):
    """Assert that the event files of a run have the figures of its record."""
    scalars = read_events(results, record)
    assert scalars["test/mean"] == pytest.approx({record.train.steps if record.train else 0: record.mean()})
    if record.train:
        assert scalars["train/loss"] == pytest.approx({p.step: p.loss for p in record.train.curve}, rel=1e-4)
