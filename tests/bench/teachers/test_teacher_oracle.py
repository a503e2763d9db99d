"""Closed-form solutions reach the errors that theory gives."""

import dataclasses

import pytest
import torch

from bench.errors import UserError
from bench.teachers.generator import Shape, draw_samples, make_teacher
from bench.teachers.oracle import (
    check_teacher,
    expected_known_down_error,
    known_down_estimate,
    known_shared_estimate,
    per_task_estimate,
    relative_error,
    shared_estimate,
)

SMALL = Shape(tasks=3, n=48, m=40, r=4)


def setting(rho, samples, shape=SMALL):
    teacher = make_teacher(shape, rho, 0.0, seed=0)
    return teacher, draw_samples(teacher, samples, seed=0)


def test_known_down_projections_reach_the_noise_floor():
    teacher, samples = setting(0.5, 400)
    reached = relative_error(teacher, known_down_estimate(teacher, samples))
    expected = expected_known_down_error(SMALL, 400)
    assert expected == pytest.approx(0.5 + 0.5 * 4 / 395)
    assert reached - 0.5 == pytest.approx(expected - 0.5, rel=0.25)


def test_error_of_an_estimate_is_that_on_fresh_inputs():
    teacher, samples = setting(0.5, 30)  # fewer samples than inputs
    estimate = per_task_estimate(teacher, samples)
    fresh = draw_samples(teacher, 4000, seed=0, stream=3)
    x_TNn = fresh.x_Xn.double().unflatten(0, (3, -1))
    excess = (x_TNn @ (estimate - teacher.delta()).mT).square().sum(-1).mean().item()
    measured = (excess + SMALL.m * SMALL.noise_variance) / SMALL.frozen_error
    assert relative_error(teacher, estimate) == pytest.approx(measured, rel=0.03)
    assert torch.linalg.matrix_rank(estimate).tolist() == [4, 4, 4]


def test_without_noise_each_task_is_found_exactly():
    shape = dataclasses.replace(SMALL, explained=1.0)
    teacher, samples = setting(0.25, 100, shape)
    assert relative_error(teacher, per_task_estimate(teacher, samples)) == pytest.approx(0, abs=1e-9)
    # One space of 16 = r (T + 1) inputs holds all tasks.
    assert relative_error(teacher, shared_estimate(teacher, samples, 16)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_sharing_costs_the_predicted_bias(rho):
    # (1 - ρ) (1 - 1 / T) ‖Δ‖², and without noise ‖Δ‖² is the frozen layer's error.
    shape = dataclasses.replace(SMALL, explained=1.0)
    teacher, samples = setting(rho, 4000, shape)
    bias = relative_error(teacher, known_shared_estimate(teacher, samples, 4))
    assert bias == pytest.approx((1 - rho) * (1 - 1 / 3), abs=0.01)


def test_sharing_pays_for_equal_tasks_with_few_samples():
    teacher, samples = setting(1.0, 60)
    shared, own = shared_estimate(teacher, samples, 4), per_task_estimate(teacher, samples)
    assert relative_error(teacher, shared) < relative_error(teacher, own)
    other, its_samples = setting(0.0, 600)
    shared, own = shared_estimate(other, its_samples, 4), per_task_estimate(other, its_samples)
    assert relative_error(other, shared) > relative_error(other, own)


def test_check_finds_a_wrong_teacher():
    teacher, samples = setting(0.5, 100)
    checks = check_teacher(teacher, samples)
    assert checks["cosine_error"] < 1e-6 and 0.5 < checks["known_down"] < 0.54
    with pytest.raises(UserError, match="principal cosines are off by 1"):
        check_teacher(dataclasses.replace(teacher, rho_down=0.6), samples)
    # Inputs in which the teacher's directions are much weaker than it assumes.
    with pytest.raises(UserError, match="closed-form solution has the error"):
        check_teacher(teacher, dataclasses.replace(samples, noise_Xm=3 * samples.noise_Xm))
