"""Equations 8 to 10, and the properties that they are meant to have."""

import math

import pytest
import torch

from malora import METHODS, MaloraLayer
from malora.initialization import kaiming_uniform
from malora.routing import RoutingLog


def factors(n: int = 96, method: str = "malora", **options):
    torch.manual_seed(0)
    layer = MaloraLayer(torch.nn.Linear(n, 48), "layer", RoutingLog())
    layer.update_layer("default", METHODS[method](**options))
    return layer.factors("default")


def test_up_projections_start_at_zero():
    assert (factors().B == 0).all()
    decomposed = factors(method="malora-decomposed-b")
    assert (decomposed.S_B == 0).all() and decomposed.Q.abs().sum() > 0


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_equations_9_and_10(beta):
    """Compare P and S with equations 9 and 10, with the draws of the same seed.

    K_t = U_t Σ_t V_t, P_t = (U_t Σ_t)[:r] / β, S = β V_0.
    """
    got = factors(beta=beta)
    torch.manual_seed(0)
    torch.nn.Linear(96, 48)  # draws the random numbers of the layer's frozen weight
    K = kaiming_uniform(torch.Size((8, 32, 96)))
    for t in range(8):
        U, sigma, V = torch.linalg.svd(K[t], full_matrices=False)
        # An SVD leaves the signs of singular vectors free, so we compare magnitudes.
        torch.testing.assert_close((got.P[t] * beta).abs(), (U * sigma)[:12].abs(), rtol=1e-3, atol=1e-4)
    _, _, V = torch.linalg.svd(K[0], full_matrices=False)
    torch.testing.assert_close((got.S / beta).abs(), V.abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["malora", "malora-small", "malora-symmetric", "malora-unshared-s", "molora"])
def test_down_projections_have_the_norm_of_a_kaiming_uniform_matrix(method):
    """Check the mean squared norm of the rows of down projections.

    Entries uniform in ±1/√n have variance 1/(3n), so a row of n entries has squared norm 1/3.
    """
    down = factors(n=512, method=method).down()
    assert (down**2).sum(-1).mean().item() == pytest.approx(1 / 3, rel=0.1)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_beta_moves_gradient_between_p_and_s(beta):
    """|∂L/∂P| is proportional to β and |∂L/∂S| to 1/β (equation 16)."""

    def norms(beta):
        torch.manual_seed(0)
        layer = MaloraLayer(torch.nn.Linear(96, 48), "layer", RoutingLog())
        layer.update_layer("default", METHODS["malora"](beta=beta, lora_dropout=0.0))
        with torch.no_grad():
            layer.malora_B["default"].normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(4, 5, 96, generator=torch.Generator().manual_seed(2))
        layer(x).sum().backward()
        return layer.malora_P["default"].grad.norm().item(), layer.malora_S["default"].grad.norm().item()

    (p, s), (p_one, s_one) = norms(beta), norms(1.0)
    assert p / p_one == pytest.approx(beta, rel=1e-3)
    assert s / s_one == pytest.approx(1 / beta, rel=1e-3)


def test_same_start_and_separate_start():
    same, separate = factors(method="molora-same-a").A, factors(method="molora").A
    assert torch.equal(same, same[:1].expand_as(same))
    assert not torch.equal(separate[0], separate[1])
    assert separate.abs().max() <= 1 / math.sqrt(96)


def test_a_subspace_wider_than_the_layer_is_an_error():
    with pytest.raises(ValueError, match="d=32 is more than the 16 inputs"):
        factors(n=16)
