"""CCA against its definitions and known angles, and the similarity of experts.

The experts are in models whose factors are known.
"""

import math

import pytest
import torch

from malora.analysis import canonical_correlations, chance_level, extract_experts, means, similarities, spectra
from tests.malora.analysis.helpers import adapted, random, rotated


def by_covariance(X, Y):
    """Compute canonical correlations as Hotelling defined them.

    They are the singular values of Σxx^(-1/2) Σxy Σyy^(-1/2), centred.
    """

    def inverse_root(C):
        values, vectors = torch.linalg.eigh(C)
        return vectors @ (values**-0.5).diag() @ vectors.T

    p = len(X)
    C = torch.cov(torch.cat([X, Y]))
    return torch.linalg.svdvals(inverse_root(C[:p, :p]) @ C[:p, p:] @ inverse_root(C[p:, p:]))


def test_canonical_correlations_agree_with_the_covariance_formula():
    common = random(3, 50)
    X, Y = random(4, 50, seed=1) + 3, random(6, 50, seed=2) - 2
    X[:3] += common
    Y[:3] += 2 * common
    got = canonical_correlations(X, Y, centred=True)
    torch.testing.assert_close(got, by_covariance(X, Y), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got, canonical_correlations(X, Y))  # the default keeps the means of the rows


@pytest.mark.parametrize("centred", [False, True])
def test_the_same_row_space_has_correlations_one(centred):
    X = random(5, 40)
    torch.testing.assert_close(canonical_correlations(X, random(5, 5, seed=1) @ X, centred=centred), X.new_ones(5))


def test_orthogonal_row_spaces_have_correlations_zero():
    Q = torch.linalg.qr(random(30, 10)).Q.T
    assert canonical_correlations(Q[:5], Q[5:]).abs().max() < 1e-14


def test_correlations_are_the_cosines_of_known_angles():
    X, Y = rotated([0.0, 0.3, 1.0, math.pi / 2])
    expected = torch.tensor([1.0, math.cos(0.3), math.cos(1.0), 0.0], dtype=torch.float64)
    torch.testing.assert_close(canonical_correlations(X, Y), expected, rtol=0, atol=1e-12)


def test_invertible_mixing_of_rows_changes_nothing():
    X, Y = random(4, 40), random(6, 40, seed=1)
    for centred in (False, True):
        mixed = canonical_correlations(random(4, 4, seed=2) @ X, random(6, 6, seed=3) @ Y, centred=centred)
        torch.testing.assert_close(mixed, canonical_correlations(X, Y, centred=centred), rtol=1e-9, atol=1e-12)


def test_rows_that_depend_on_others_do_not_count():
    X = random(3, 40)
    assert len(canonical_correlations(torch.cat([X, X]), random(5, 40, seed=1))) == 3
    assert len(canonical_correlations(torch.zeros(3, 40), X)) == 0


@pytest.mark.parametrize("p, q, n", [(8, 8, 576), (12, 12, 32), (4, 12, 64), (12, 4, 64), (20, 20, 32), (1, 1, 100)])
def test_the_chance_level_is_that_of_random_matrices(p, q, n):
    draws = [canonical_correlations(random(p, n, seed=s), random(q, n, seed=s + 10_000)) for s in range(400)]
    for statistic, power in (("mean", 1), ("mean_square", 2)):
        found = torch.stack([(rho**power).mean() for rho in draws])
        # Both have an error: we draw 400 pairs here, `chance_level` draws 4,000 over the rank.
        four_errors = 4 * found.std().item() * math.sqrt(1 / 400 + min(p, q) / 4000)
        assert chance_level(p, q, n, statistic) == pytest.approx(found.mean().item(), abs=four_errors)


def test_the_chance_level_of_one_row_is_known():
    """Check the mean of |cos| of a random angle in n dimensions, and of its square.

    The mean is Γ(n/2) / (√π Γ((n+1)/2)), and that of the square is 1/n.
    """
    exact = math.exp(math.lgamma(48) - math.lgamma(48.5)) / math.sqrt(math.pi)
    assert chance_level(1, 1, 96) == pytest.approx(exact, rel=0.04)  # three standard errors
    assert chance_level(1, 1, 96, "mean_square") == 1 / 96
    assert chance_level(32, 32, 32) == pytest.approx(1)


def test_up_projections_of_figure_2_are_below_the_chance_level_of_the_mean():
    """Check that the chance level is above Figure 2's 0.006 to 0.015.

    LLaMA-2 7B has up projections with 4,096 and 11,008 outputs.
    """
    assert chance_level(8, 8, 4096) == pytest.approx(0.85 * math.sqrt(8 / 4096), rel=0.03)
    assert chance_level(8, 8, 11008) > 0.02


def test_similarities_compare_every_pair_of_experts():
    model = adapted("molora")
    records = similarities(model)
    assert len(records) == 2 * 2 * 2 * 28  # modules, projections, pairs of 8
    assert {r.module for r in records} == {layer.name for layer in model.base_model.malora_layers}
    layer = next(layer for layer in model.base_model.malora_layers if layer.name.endswith("1.mlp.up_proj"))
    factors = layer.factors("default")
    for projection, matrices in (("A", factors.A), ("B", factors.B)):  # B is stored transposed
        (record,) = [r for r in records if r[:4] == (layer.name, projection, 2, 5)]
        assert record.value() == pytest.approx(canonical_correlations(matrices[2], matrices[5]).mean().item())
    assert similarities(model, centred=True)[0].chance("mean_square") == 8 / 63


def test_random_experts_have_the_similarity_of_chance():
    """Each of the 224 pairs per projection is within about 5% of the mean."""
    for value, chance in means(similarities(adapted("molora"))).values():
        assert value == pytest.approx(chance, rel=0.02)


def test_experts_with_the_same_start_are_equal():
    assert means(similarities(adapted("molora-same-a")))["A"][0] == pytest.approx(1)


def test_experts_over_a_shared_subspace_lie_in_it():
    model = adapted()
    for factors in extract_experts(model).values():
        for down in factors.down():
            torch.testing.assert_close(canonical_correlations(down, factors.S), down.new_ones(12))
    value, chance = means(similarities(model))["A"]
    assert chance == pytest.approx(chance_level(12, 12, 32))  # not that of 64 coordinates
    assert value > 1.05 * chance  # P_t = U_t Σ_t (equation 9) emphasises the first rows of S
    for name, p in model.named_parameters():
        if "malora_P" in name:
            p.data.normal_()
    assert means(similarities(model))["A"][0] == pytest.approx(chance, rel=0.02)
    # With r = d every expert spans the whole subspace.
    assert means(similarities(adapted(r=16, d=16)))["A"] == pytest.approx((1, 1))
    _, up_chance = means(similarities(adapted("malora-decomposed-b")))["B"]
    assert up_chance == pytest.approx(chance_level(12, 12, 32))


def test_a_subspace_per_expert_limits_its_rank():
    """Without a shared S an expert has d/N = 4 dimensions for its 12 rows."""
    records = similarities(adapted("malora-unshared-s"))
    assert {r.chance("mean_square") for r in records if r.projection == "A"} == {4 / 64}


@pytest.mark.parametrize("method, pairs", [("lora", 1), ("dora", 1), ("asylora", 1), ("molora", 64), ("malora", 64)])
def test_similarities_of_two_models(method, pairs):
    options = {"r": 8, "lora_alpha": 16} if method in ("lora", "dora", "asylora") else {}
    one, another = adapted(method, **options), adapted(method, seed=1, **options)
    records = similarities(one, another)
    assert len(records) == 2 * 2 * 2 * pairs
    rank = 12 if method == "malora" else 8
    assert {r.chance() for r in records if r.projection == "A"} == {chance_level(rank, rank, 64)}
    again = similarities(one, one)
    assert all(r.value() == pytest.approx(1) for r in again if r.i == r.j)


def test_peft_lora_is_read_as_one_expert():
    one, another = (adapted("lora", seed=seed, r=4, lora_alpha=8) for seed in (0, 1))
    name = "model.layers.0.mlp.up_proj"
    layers = [model.get_base_model().get_submodule(name) for model in (one, another)]
    A, B = ([getattr(layer, part)["default"].weight for layer in layers] for part in ("lora_A", "lora_B"))
    found = {r.projection: r.value() for r in similarities(one, another) if r.module == name}
    assert found["A"] == pytest.approx(canonical_correlations(*A).mean().item())
    assert found["B"] == pytest.approx(canonical_correlations(B[0].T, B[1].T).mean().item())


def test_zero_experts_have_no_value():
    records = similarities(adapted("molora", trained_up=False))
    assert all(
        (r.value() is None) == (r.projection == "B") and (r.chance() is None) == (r.projection == "B") for r in records
    )
    assert means(records)["B"] is None and means(records)["A"] is not None


def test_bfloat16_adapters_are_analysed_in_float64():
    model = adapted().to(torch.bfloat16)
    wide = adapted().to(torch.bfloat16).to(torch.float64)
    assert similarities(model) == similarities(wide) and spectra(model) == spectra(wide)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_inputs_that_cannot_be_compared_are_errors():
    with pytest.raises(ValueError, match="one expert per module; give another model"):
        similarities(adapted("lora", r=4))
    with pytest.raises(ValueError, match="statistic='median' is unknown; choose one of 'mean', 'mean_square'"):
        means(similarities(adapted()), "median")
    with pytest.raises(ValueError, match=r"X \[2, 9\] and Y \[2, 8\] must be \[p, n\] and \[q, n\]"):
        canonical_correlations(random(2, 9), random(2, 8))
    with pytest.raises(ValueError, match="p=40 and q=8 must be from 1 to n=32"):
        chance_level(40, 8, 32)
