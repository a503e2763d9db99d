"""Movement of factors by known rotations and by training."""

import math
import sys

import pytest
import torch

from malora.analysis import extract_experts, movement
from tests.malora.analysis.helpers import adapted, rotated


def trained(method, ids, steps=3):
    model = adapted(method, trained_up=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_training_moves_s_unless_it_is_frozen(ids):
    moved = movement(trained("malora", ids), adapted(trained_up=False))
    assert [(m.module, m.expert) for m in moved] == [(name, None) for name in extract_experts(adapted())]
    assert all(m.relative > 0.01 and len(m.angles) == 32 and max(m.angles) > 0.01 for m in moved)
    frozen = movement(trained("malora-fixed-s", ids), adapted("malora-fixed-s", trained_up=False))
    assert all(m.relative == 0 and max(m.angles) < 1e-12 for m in frozen)
    separate = movement(trained("molora", ids), adapted("molora", trained_up=False), factor="A")
    assert [m.expert for m in separate] == list(range(8)) * 4 and all(m.relative > 0 for m in separate)


def test_movement_in_numbers():
    """Compute the angles of a known rotation.

    Flipped signs move the matrix, but not its row space.
    """
    start, model = adapted("malora", d=2, r=2, lora_alpha=4), adapted("malora", d=2, r=2, lora_alpha=4)
    before, after = rotated([0.2, 0.5], n=64)
    for m, S in ((start, before), (model, after)):
        for layer in m.base_model.malora_layers:
            layer.malora_S["default"].data.copy_(S)
    found = movement(model, start)[0]
    assert found.angles == pytest.approx([0.5, 0.2], abs=1e-6)
    # A unit row turned by an angle moves by the chord 2 sin(angle / 2).
    assert found.relative == pytest.approx(math.sqrt(2 * math.sin(0.1) ** 2 + 2 * math.sin(0.25) ** 2), rel=1e-5)
    for layer in start.base_model.malora_layers:
        layer.malora_S["default"].data.copy_(-after)
    flipped = movement(model, start)[0]
    assert flipped.relative == pytest.approx(2) and max(flipped.angles) < 1e-6


def test_a_factor_that_cannot_be_compared_is_an_error():
    model = adapted()
    for factor, start in (("A", model), ("S", adapted(d=16)), ("B", adapted(trained_up=False)), ("Z", model)):
        with pytest.raises(ValueError, match=rf"factor='{factor}' must have one shape .*'P': \[8, 12, 32\]"):
            movement(model, start, factor=factor)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)  # makes the import fail
    with pytest.raises(ImportError, match=r"needs SciPy: pip install 'malora\[analysis\]'"):
        movement(adapted(), adapted())
