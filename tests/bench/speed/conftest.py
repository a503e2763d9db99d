"""Run the speed benchmark's tests on a CPU and in short rounds."""

import pytest
import torch


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, short_rounds):
    """Hide a GPU, which has other rows and other defaults."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
