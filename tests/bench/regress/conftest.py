"""Figures and records for the tests of `bench.regress`."""

import pytest
import torch

from bench.records.regressions import Figure, Machine, Regressions
from tests.bench.conftest import CLEAN

MACHINE = Machine(
    processor="a CPU", instructions="AVX2", packages=dict.fromkeys(("torch", "transformers", "peft"), "1")
)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Hide a GPU: with one, figures are measured in a process of their own, where a test can change nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def make_regressions(**figures: Figure) -> Regressions:
    """Make committed figures; underscores in names stand for dots."""
    named = {name.replace("_", "."): figure for name, figure in figures.items()}
    return Regressions(schema=1, provenance=CLEAN, machine=MACHINE, base_hash="base", figures=named)
