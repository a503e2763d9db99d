"""The rivals compute what the reference computes, forward and every gradient, and leave no trace behind them."""

import pytest
import torch

from bench.rivals import TOP_K, registered
from malora import BACKENDS, METHODS, MaloraConfig
from tests.malora.test_backends import assert_agrees, layer, methods, run


@pytest.fixture(autouse=True)
def rivals():
    with registered():
        yield


@pytest.mark.parametrize("method", methods)
@pytest.mark.parametrize("backend", ["loop", "sorted-top2"])
def test_agrees_with_the_reference(method, backend):
    assert_agrees(layer(METHODS[method](lora_dropout=0.3)), backend, torch.randn(3, 11, 72, dtype=torch.float64))


@pytest.mark.parametrize("top_k", TOP_K)
def test_agrees_for_any_number_of_experts_a_token(top_k):
    made = layer(METHODS["molora"](top_k=top_k, r=5))
    assert_agrees(made, f"sorted-top{top_k}", torch.randn(1, 7, 72, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["loop", "sorted-top2"])
def test_an_expert_without_tokens_gets_a_zero_gradient(backend):
    made = layer(METHODS["molora"]())
    with torch.no_grad():
        made.malora_router["default"][:, 0] = torch.arange(8.0) - 100 * (torch.arange(8) == 3)
        made.malora_router["default"][3, 1:] = 0
    gradients = run(made, backend, torch.randn(2, 6, 72, dtype=torch.float64).abs() + 1)
    assert (gradients["malora_B.default"][3] == 0).all() and torch.isfinite(gradients["x"]).all()


def test_they_are_registered_only_inside():
    assert MaloraConfig(backend="loop", d=4).backend == "loop"
    before = dict(BACKENDS)
    with pytest.raises(RuntimeError), registered():
        raise RuntimeError
    assert set(before) - set(BACKENDS) == {"loop", *(f"sorted-top{k}" for k in TOP_K)}
    BACKENDS.update(before)
