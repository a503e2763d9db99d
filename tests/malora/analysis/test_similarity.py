"""CCA against its definitions and known angles; then whole models, where the factors are known."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import malora
from malora.analysis.experts import experts
from malora.analysis.similarity import (
    Spectrum,
    canonical_correlations,
    chance_level,
    means,
    movement,
    similarities,
    spectra,
)
from tests.conftest import make_model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(method="malora", seed=0, trained_up=True, targets=("q_proj", "up_proj"), **options):
    """Two layers, q_proj 64 to 64 and up_proj 64 to 96, whose up sides are random, as after some training."""
    base = make_model()
    torch.manual_seed(seed)
    model = get_peft_model(base, malora.METHODS[method](target_modules=list(targets), **options))
    if trained_up:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if any(part in name for part in ("lora_B", "malora_B", "malora_S_B")):
                    p.normal_()
    return model


def by_covariance(X, Y):
    """Canonical correlations as Hotelling defined them: singular values of Σxx^(-1/2) Σxy Σyy^(-1/2), centred."""

    def inverse_root(C):
        values, vectors = torch.linalg.eigh(C)
        return vectors @ (values**-0.5).diag() @ vectors.T

    p = len(X)
    C = torch.cov(torch.cat([X, Y]))
    return torch.linalg.svdvals(inverse_root(C[:p, :p]) @ C[:p, p:] @ inverse_root(C[p:, p:]))


def rotated(angles, n=20):
    """Matrices whose row spaces have these principal angles: the axes, and each turned towards an axis of its own."""
    r, eye = len(angles), torch.eye(n, dtype=torch.float64)
    angles = torch.tensor(angles, dtype=torch.float64)[:, None]
    return eye[:r], angles.cos() * eye[:r] + angles.sin() * eye[r : 2 * r]


def test_the_covariance_formula_gives_the_same():
    common = random(3, 50)
    X, Y = random(4, 50, seed=1) + 3, random(6, 50, seed=2) - 2
    X[:3] += common
    Y[:3] += 2 * common
    got = canonical_correlations(X, Y, centred=True)
    torch.testing.assert_close(got, by_covariance(X, Y), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got, canonical_correlations(X, Y))  # whose rows' means count


@pytest.mark.parametrize("centred", [False, True])
def test_the_same_row_space_has_correlations_one(centred):
    X = random(5, 40)
    torch.testing.assert_close(canonical_correlations(X, random(5, 5, seed=1) @ X, centred=centred), X.new_ones(5))


def test_orthogonal_row_spaces_have_correlations_zero():
    Q = torch.linalg.qr(random(30, 10)).Q.T
    assert canonical_correlations(Q[:5], Q[5:]).abs().max() < 1e-14


def test_a_known_rotation():
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
        # Both may be off: 400 pairs here, 4,000 over the rank there.
        four_errors = 4 * found.std().item() * math.sqrt(1 / 400 + min(p, q) / 4000)
        assert chance_level(p, q, n, statistic) == pytest.approx(found.mean().item(), abs=four_errors)


def test_the_chance_level_of_one_row_is_known():
    """|cos| of a random angle in n dimensions has mean Γ(n/2) / (√π Γ((n+1)/2)); its square has mean 1/n."""
    exact = math.exp(math.lgamma(48) - math.lgamma(48.5)) / math.sqrt(math.pi)
    assert chance_level(1, 1, 96) == pytest.approx(exact, rel=0.04)  # three standard errors
    assert chance_level(1, 1, 96, "mean_square") == 1 / 96
    assert chance_level(32, 32, 32) == pytest.approx(1)


def test_figure_2s_up_sides_are_below_the_chance_level_of_the_mean():
    """0.006 to 0.015 read off; LLaMA-2 7B has up sides of 4,096 and 11,008 rows. `chance_level` says so."""
    assert chance_level(8, 8, 4096) == pytest.approx(0.85 * math.sqrt(8 / 4096), rel=0.03)
    assert chance_level(8, 8, 11008) > 0.02


def test_experts_of_one_model():
    model = adapted("molora")
    records = similarities(model)
    assert len(records) == 2 * 2 * 2 * 28  # modules, sides, pairs of 8
    assert {r.module for r in records} == {layer.name for layer in model.base_model.malora_layers}
    layer = next(layer for layer in model.base_model.malora_layers if layer.name.endswith("1.mlp.up_proj"))
    factors = layer.factors("default")
    for side, matrices in (("A", factors.A), ("B", factors.B)):  # B is kept transposed
        (record,) = [r for r in records if r[:4] == (layer.name, side, 2, 5)]
        assert record.value() == pytest.approx(canonical_correlations(matrices[2], matrices[5]).mean().item())
    assert similarities(model, centred=True)[0].chance("mean_square") == 8 / 63


def test_random_experts_are_as_alike_as_chance_says():
    """224 pairs a side, each within about 5% of the mean."""
    for value, chance in means(similarities(adapted("molora"))).values():
        assert value == pytest.approx(chance, rel=0.02)


def test_experts_that_started_alike_are_alike():
    assert means(similarities(adapted("molora-same-a")))["A"][0] == pytest.approx(1)


def test_experts_over_a_shared_subspace_lie_in_it():
    model = adapted()
    for factors in experts(model).values():
        for down in factors.down():
            torch.testing.assert_close(canonical_correlations(down, factors.S), down.new_ones(12))
    value, chance = means(similarities(model))["A"]
    assert chance == pytest.approx(chance_level(12, 12, 32))  # and not of 64 coordinates
    assert value > 1.05 * chance  # P_t = U_t Σ_t (eq. 9) leans to the first rows of S
    for name, p in model.named_parameters():
        if "malora_P" in name:
            p.data.normal_()
    assert means(similarities(model))["A"][0] == pytest.approx(chance, rel=0.02)
    # With r = d they span it, whatever they are.
    assert means(similarities(adapted(r=16, d=16)))["A"] == pytest.approx((1, 1))
    _, up_chance = means(similarities(adapted("malora-decomposed-b")))["B"]
    assert up_chance == pytest.approx(chance_level(12, 12, 32))


def test_an_experts_own_narrow_subspace_limits_its_rank():
    """Without a shared S an expert has d/N = 4 dimensions for its 12 rows."""
    records = similarities(adapted("malora-unshared-s"))
    assert {r.chance("mean_square") for r in records if r.side == "A"} == {4 / 64}


@pytest.mark.parametrize("method, pairs", [("lora", 1), ("dora", 1), ("asylora", 1), ("molora", 64), ("malora", 64)])
def test_two_models(method, pairs):
    options = {"r": 8, "lora_alpha": 16} if method in ("lora", "dora", "asylora") else {}
    one, another = adapted(method, **options), adapted(method, seed=1, **options)
    records = similarities(one, another)
    assert len(records) == 2 * 2 * 2 * pairs
    rank = 12 if method == "malora" else 8
    assert {r.chance() for r in records if r.side == "A"} == {chance_level(rank, rank, 64)}
    again = similarities(one, one)
    assert all(r.value() == pytest.approx(1) for r in again if r.i == r.j)


def test_peft_lora_is_read_as_one_expert():
    one, another = (adapted("lora", seed=seed, r=4, lora_alpha=8) for seed in (0, 1))
    name = "model.layers.0.mlp.up_proj"
    layers = [model.get_base_model().get_submodule(name) for model in (one, another)]
    A, B = ([getattr(layer, part)["default"].weight for layer in layers] for part in ("lora_A", "lora_B"))
    found = {r.side: r.value() for r in similarities(one, another) if r.module == name}
    assert found["A"] == pytest.approx(canonical_correlations(*A).mean().item())
    assert found["B"] == pytest.approx(canonical_correlations(B[0].T, B[1].T).mean().item())


def test_what_is_zero_has_no_value():
    records = similarities(adapted("molora", trained_up=False))
    assert all((r.value() is None) == (r.side == "B") and (r.chance() is None) == (r.side == "B") for r in records)
    assert means(records)["B"] is None and means(records)["A"] is not None


def test_narrow_adapters_are_computed_in_float64():
    model = adapted().to(torch.bfloat16)
    wide = adapted().to(torch.bfloat16).to(torch.float64)
    assert similarities(model) == similarities(wide) and spectra(model) == spectra(wide)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_orthonormal_experts_have_a_flat_spectrum():
    model = adapted("molora", r=4, lora_alpha=8)
    with torch.no_grad():
        for layer in model.base_model.malora_layers:
            A, B = layer.malora_A["default"], layer.malora_B["default"]
            A.copy_(torch.linalg.qr(torch.randn(A.shape[-1], 32)).Q.T.reshape(A.shape))
            B.copy_(B[:1].expand_as(B))  # eight times the same: a rank of 4
    for spectrum in spectra(model):
        assert len(spectrum.values) == 32
        if spectrum.side == "A":
            assert spectrum.values == pytest.approx([1] * 32, rel=1e-5)
            assert spectrum.share_above(0.9) == 1 and spectrum.share_above(1.1) == 0
            assert spectrum.stable_rank == pytest.approx(32) and spectrum.effective_rank == pytest.approx(32)
        else:
            assert spectrum.share_above(1e-6) == 4 / 32 and spectrum.effective_rank <= 4


def test_a_spectrum_in_numbers():
    spectrum = Spectrum("m", "A", [2.0, 1.0, 1.0, 0.0])
    assert spectrum.stable_rank == 6 / 4
    assert spectrum.effective_rank == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4: 1.5 bits
    assert spectrum.share_above(1.0) == 1 / 4
    zero = Spectrum("m", "B", [0.0, 0.0])
    assert zero.stable_rank is None and zero.effective_rank is None and zero.share_above(0) == 0


def test_a_shared_subspace_bounds_the_spectrum():
    for spectrum in spectra(adapted()):
        if spectrum.side == "A":  # N r = 96 rows of 64 coordinates, in 32 dimensions
            assert len(spectrum.values) == 64 and spectrum.share_above(1e-9) == 1 / 2


def trained(method, ids, steps=3):
    model = adapted(method, trained_up=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_training_moves_s_and_freezing_holds_it(ids):
    moved = movement(trained("malora", ids), adapted(trained_up=False))
    assert [(m.module, m.expert) for m in moved] == [(name, None) for name in experts(adapted())]
    assert all(m.relative > 0.01 and len(m.angles) == 32 and max(m.angles) > 0.01 for m in moved)
    held = movement(trained("malora-fixed-s", ids), adapted("malora-fixed-s", trained_up=False))
    assert all(m.relative == 0 and max(m.angles) < 1e-12 for m in held)
    own = movement(trained("molora", ids), adapted("molora", trained_up=False), factor="A")
    assert [m.expert for m in own] == list(range(8)) * 4 and all(m.relative > 0 for m in own)


def test_movement_in_numbers():
    """Sign and mixing of S's rows count as movement of the matrix, not of its row space; a turn is a turn."""
    start, model = adapted("malora", d=2, r=2, lora_alpha=4), adapted("malora", d=2, r=2, lora_alpha=4)
    before, after = rotated([0.2, 0.5], n=64)
    for m, S in ((start, before), (model, after)):
        for layer in m.base_model.malora_layers:
            layer.malora_S["default"].data.copy_(S)
    found = movement(model, start)[0]
    assert found.angles == pytest.approx([0.5, 0.2], abs=1e-6)
    # Two unit rows, turned: chords of 2 sin(angle / 2).
    assert found.relative == pytest.approx(math.sqrt(2 * math.sin(0.1) ** 2 + 2 * math.sin(0.25) ** 2), rel=1e-5)
    for layer in start.base_model.malora_layers:
        layer.malora_S["default"].data.copy_(-after)
    flipped = movement(model, start)[0]
    assert flipped.relative == pytest.approx(2) and max(flipped.angles) < 1e-6


def test_what_cannot_be_compared_says_so():
    model = adapted()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts of an adapter 'default'; it has none; make"):
        similarities(make_model())
    with pytest.raises(ValueError, match=r"adapter 'second'; it has \['default'\]"):
        spectra(model, "second")
    with pytest.raises(ValueError, match="one expert a module; give another model"):
        similarities(adapted("lora", r=4))
    with pytest.raises(ValueError, match=r"only one has \['model.layers.0.mlp.up_proj'"):
        similarities(model, adapted(targets=["q_proj"]))
    wider = make_model("qwen2")
    wider.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 80)
    wider = get_peft_model(wider, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj maps 64 to 64 in one model and 64 to 80 in the other"):
        similarities(adapted(targets=["q_proj"]), wider)
    with pytest.raises(ValueError, match="statistic='median' is unknown; choose one of 'mean', 'mean_square'"):
        means(similarities(model), "median")
    with pytest.raises(ValueError, match=r"X \[2, 9\] and Y \[2, 8\] must be \[p, n\] and \[q, n\]"):
        canonical_correlations(random(2, 9), random(2, 8))
    with pytest.raises(ValueError, match="p=40 and q=8 must be from 1 to n=32"):
        chance_level(40, 8, 32)
    for factor, start in (("A", model), ("S", adapted(d=16)), ("B", adapted(trained_up=False)), ("Z", model)):
        with pytest.raises(ValueError, match=rf"factor='{factor}' must be in both, of one .*'P': \[8, 12, 32\]"):
            movement(model, start, factor=factor)
    next(p for n, p in model.named_parameters() if "malora_S" in n).data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"not finite in model\.layers\.0\.self_attn\.q_proj: its training"):
        spectra(model)
