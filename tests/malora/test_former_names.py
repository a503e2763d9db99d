"""Names of the last version, which this one still knows."""

import importlib
import sys

import pytest

import malora
from malora import analysis


def test_held_weights_is_the_weight_cache():
    with pytest.warns(DeprecationWarning, match=r"malora\.HeldWeights is now malora\.WeightCache"):
        assert malora.HeldWeights is malora.WeightCache


def test_a_name_that_never_was_is_an_error():
    with pytest.raises(AttributeError, match="module 'malora' has no attribute 'HeldWeight'"):
        malora.HeldWeight  # noqa: B018


@pytest.mark.parametrize("name, former_names", [
    ("malora.similarity", {"means": "means", "similarities": "similarities", "spectra": "spectra",
                           "movement": "movement", "Similarity": "Similarity"}),
    ("malora.experts", {"experts": "extract_experts", "saved_experts": "load_experts", "Experts": "Experts"}),
])  # fmt: skip
def test_a_former_module_warns_and_has_the_same_functions(name, former_names, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match=rf"{name} is now malora\.analysis") as caught:
        module = importlib.import_module(name)
    assert {former: getattr(module, former) for former in former_names} == {
        former: getattr(analysis, now) for former, now in former_names.items()
    }
    assert len(caught) == 1
