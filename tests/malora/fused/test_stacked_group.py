"""The projection group with stacked adapters, on its own."""

import pytest
import torch
from torch import nn

from malora import METHODS
from malora.factors import Factors, StackedWeights
from malora.fused.availability import interprets_triton
from malora.fused.stacked_group import _matmul_tn, forward_stacked_group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, R, S, n = 2, 1, 3, 8
pytestmark = pytest.mark.skipif(not (interprets_triton() or torch.cuda.is_available()), reason="needs Triton")


class Layer(nn.Module):
    def __init__(self, m, bias):
        super().__init__()
        self.base_layer = nn.Linear(n, m, bias=bias).requires_grad_(False)


def make(method, dropout=0.5):
    """Return a function of the tensors that want gradients, and these."""
    torch.manual_seed(0)
    options = {"num_experts": 3, "top_k": 2} if method in ("malora", "molora") else {}
    options |= {"d": 4} if method == "malora" else {}
    config = METHODS[method](r=2, lora_alpha=4, lora_dropout=dropout, **options)
    layers = [Layer(m, bias).to(DEVICE, torch.float64) for m, bias in ((5, True), (7, False))]
    N, r, G = config.num_experts, config.r, len(layers)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)

    x = draw(K * R, S, n)
    router = draw(K, G * N, n) if config.has_router else None
    down = draw(K, G * (config.d or N * r), n)
    P = [draw(K, N, r, config.d) if config.d else None for _ in layers]
    B = [draw(K, N, r, layer.base_layer.out_features) for layer in layers]
    tensors = [t for t in (x, router, down, *P, *B) if t is not None]

    def compute(*_):
        torch.manual_seed(0)  # of dropout
        factors = [Factors(None, p, None, b, None, None) for p, b in zip(P, B, strict=True)]
        weights = StackedWeights(("a", "b"), router, down, factors)
        ys, probabilities = forward_stacked_group(layers, weights, config, x)
        return (*ys, *probabilities)

    return compute, tensors, layers


@pytest.mark.parametrize("method", ["malora", "molora", "asylora"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_the_outputs(method, dropout):
    compute, tensors, _ = make(method, dropout)
    assert torch.autograd.gradcheck(compute, tensors, fast_mode=True, atol=1e-6)


def test_each_call_draws_a_mask_and_evaluation_none():
    compute, (x, *_), layers = make("malora")
    with torch.no_grad():
        first, second = compute()[0], compute()[0]
        assert torch.equal(first, second)  # of one seed
        for layer in layers:
            layer.eval()
        without = compute()[0]
        assert not torch.allclose(first, without) and without.shape == (K * R, S, 5) and x.shape[1] == S


def test_a_frozen_factor_gets_no_gradient():
    compute, tensors, _ = make("asylora")
    x, down, *Bs = tensors
    down.requires_grad_(False)
    sum(y.sum() for y in compute()).backward()
    assert down.grad is None and x.grad is not None and all(B.grad is not None for B in Bs)


@pytest.mark.parametrize("T", [768, 1023])
def test_sums_over_tokens_are_divided(T, monkeypatch):
    """Also of operands that are columns of wider rows. An odd number of tokens is not divided."""
    sizes, multiply = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(len(a)) or multiply(a, b))
    left, right = (torch.randn(K, T, 12, dtype=torch.float64)[..., 2:columns] for columns in (7, 10))
    torch.testing.assert_close(_matmul_tn(left, right, 0.5), torch.einsum("kta,ktb->kab", left, right) / 2)
    assert (sizes[0] > K) is (T == 768)
