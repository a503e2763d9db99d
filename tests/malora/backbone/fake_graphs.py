"""CUDA graphs without a GPU: a replay runs the captured function again."""

from contextlib import nullcontext

import pytest

from malora.backbone import capture, captured_pass


class FakeGraph:
    """Stand for a graph. As with a real one, the capture itself changes no tensor that lives on."""

    captures = 0
    is_running = False

    def __init__(self, run, passes=0, pool=None, stream=None):
        sums = run.__closure__ and [cell.cell_contents for cell in run.__closure__]
        kept = [total for owner in sums if isinstance(owner, captured_pass.Gradients) for total in owner.sums]
        before = [total.clone() for total in kept]
        self.run = run
        self.replay()
        for total, value in zip(kept, before, strict=True):
            total.copy_(value)
        FakeGraph.captures += 1

    def replay(self):
        FakeGraph.is_running = True
        try:
            self.run()
        finally:
            FakeGraph.is_running = False

    def pool(self):
        return "pool"


class FakeSideStream:
    stream = None

    def active(self):
        return nullcontext()


@pytest.fixture
def graphs(monkeypatch):
    """Let steps on a CPU capture their passes; the fixture counts them."""
    monkeypatch.setattr(FakeGraph, "captures", 0)
    monkeypatch.setattr(captured_pass, "capture", FakeGraph)
    monkeypatch.setattr("malora.router_callback.is_captured", lambda like: FakeGraph.is_running)
    monkeypatch.setattr(capture, "SideStream", FakeSideStream)
    monkeypatch.setattr(capture, "why_not_captured", lambda model: None)
    monkeypatch.setattr(capture, "capture_refresh", lambda weights: weights.refresh() or weights.refresh)
    return FakeGraph
