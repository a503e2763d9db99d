"""Teachers have the geometry that their dials say."""

import pytest
import torch

from bench.errors import UserError
from bench.teachers.generator import (
    Shape,
    cosine_error,
    draw_samples,
    make_teacher,
    predicted_crossover,
    principal_cosines,
    residuals,
    shared_energy,
)

SMALL = Shape(tasks=3, n=48, m=40, r=4)


@pytest.mark.parametrize("rho", [0.0, 0.25, 1.0])
def test_principal_cosines_are_the_dials(rho):
    teacher = make_teacher(SMALL, rho, 1 - rho, seed=3)
    down = principal_cosines(teacher.down_Trn)
    assert down.shape == (3, 4)
    torch.testing.assert_close(down, torch.full_like(down, rho), rtol=0, atol=1e-7)
    up = principal_cosines(teacher.up_Tmr.mT)
    torch.testing.assert_close(up, torch.full_like(up, 1 - rho), rtol=0, atol=1e-7)
    assert cosine_error(teacher) < 1e-6


def test_cosines_at_the_size_of_the_protocol():
    assert cosine_error(make_teacher(Shape(tasks=16), 0.5, 0.75, seed=0)) < 1e-6


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_best_shared_space_has_the_predicted_energy(rho):
    # (1 + (T - 1) ρ) / T
    assert shared_energy(make_teacher(SMALL, rho, 0.0, seed=0), d=4) == pytest.approx((1 + 2 * rho) / 3)


def test_teacher_explains_its_share_of_the_variance():
    teacher = make_teacher(SMALL, 0.5, 0.5, seed=0)
    samples = draw_samples(teacher, 4000, seed=0)
    noise, both = samples.noise_Xm.square().mean().item(), residuals(teacher, samples).square().mean().item()
    assert noise / both == pytest.approx(0.5, abs=0.02)
    assert SMALL.frozen_error == pytest.approx(40 * both, rel=0.03)


def test_means_tell_tasks_apart_and_have_no_effect():
    teacher = make_teacher(SMALL, 0.5, 0.5, seed=0)
    torch.testing.assert_close(teacher.means_Tn @ teacher.means_Tn.T, 64 * torch.eye(3, dtype=torch.float64))
    assert (teacher.down_Trn @ teacher.means_Tn.T).abs().max() < 1e-12
    samples = draw_samples(teacher, 500, seed=0)
    assert (samples.x_Xn.double() @ teacher.means_Tn.T).argmax(1).equal(samples.task_X)


def test_a_seed_draws_the_same_for_every_dial():
    first, second = make_teacher(SMALL, 0.0, 0.0, seed=5), make_teacher(SMALL, 1.0, 0.5, seed=5)
    assert first.means_Tn.equal(second.means_Tn)
    assert draw_samples(first, 8, seed=5).x_Xn.equal(draw_samples(second, 8, seed=5).x_Xn)
    assert not first.means_Tn.equal(make_teacher(SMALL, 0.0, 0.0, seed=6).means_Tn)


def test_predicted_crossover():
    # With half of the variance explained σ² = ‖Δ‖² / m, so ρ* = 1 - r n / (m N).
    assert predicted_crossover(Shape(tasks=2), 256) == pytest.approx(1 - 8 / 256)
    # With 5% explained the noise has 19 times the variance.
    assert predicted_crossover(Shape(tasks=2, explained=0.05), 512) == pytest.approx(1 - 19 * 8 / 512)


def test_impossible_teachers_are_refused():
    with pytest.raises(UserError, match="need 59 orthogonal inputs"):
        Shape(tasks=11, n=48, m=48, r=4)
    with pytest.raises(UserError, match="explained=0"):
        Shape(tasks=2, explained=0)
    with pytest.raises(UserError, match=r"rho_up=1\.5"):
        make_teacher(SMALL, 0.0, 1.5, seed=0)
