"""Solutions in closed form, to check the generator and to see what sharing could gain.

An estimate is a matrix per task. Its excess error on fresh inputs is known exactly, because inputs are normal:

    E ‖(Δ̂ - Δ) x‖² = ‖Δ̂ - Δ‖² + ‖(Δ̂ - Δ) μ‖²

Everything is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.errors import UserError
from bench.teachers.generator import Samples, Shape, Teacher, by_task, cosine_error, residuals

MAX_COSINE_ERROR = 1e-6  # the protocol's
# The sum over m·r ≥ 1,000 squared normal estimates is within a few percent of its expectation.
MAX_FLOOR_RATIO = 1.5


def known_down_estimate(teacher: Teacher, samples: Samples) -> Tensor:
    """Fit B_t by least squares on A*_t x, and return B̂_t A*_t, [T, m, n].

    It is the best that a student can do: only the up projections are unknown.
    """
    return _fit_up(teacher.down_Trn, teacher, samples) @ teacher.down_Trn


def per_task_estimate(teacher: Teacher, samples: Samples) -> Tensor:
    """Fit each task by itself, and return rank-r matrices, [T, m, n].

    It is reduced-rank regression: the least-squares solution (that of smallest norm with fewer samples than inputs),
    projected to the r leading directions of its fitted outputs (Izenman 1975).
    """
    found = []
    y_TNm = torch.unflatten(residuals(teacher, samples), 0, (teacher.shape.tasks, -1))
    for x, y in zip(by_task(samples, teacher), y_TNm, strict=True):
        weights_nm = _least_squares(x, y)
        fitted = x @ weights_nm
        leading = torch.linalg.eigh(fitted.T @ fitted).eigenvectors[:, -teacher.shape.r :]
        found.append((weights_nm @ leading @ leading.T).T)
    return torch.stack(found)


def shared_estimate(teacher: Teacher, samples: Samples, d: int, own_Tmn: Tensor | None = None) -> Tensor:
    """Fit all tasks with one space of d inputs, and return the matrices, [T, m, n].

    The space has the d leading input directions of the tasks' own estimates, taken together. The up projections are
    then fitted again by least squares.

    Args:
        teacher: The teacher.
        samples: Its samples.
        d: Dimensions of the shared space.
        own_Tmn: The tasks' own estimates, if they are known.
    """
    own = per_task_estimate(teacher, samples) if own_Tmn is None else own_Tmn
    S_dn: Tensor = torch.linalg.svd(own.flatten(0, 1), full_matrices=False).Vh[:d]
    return _fit_up(S_dn.expand(teacher.shape.tasks, -1, -1), teacher, samples) @ S_dn


def known_shared_estimate(teacher: Teacher, samples: Samples, d: int) -> Tensor:
    """Fit the up projections on the teachers' best shared space of d inputs, [T, m, n]."""
    S_dn: Tensor = torch.linalg.svd(teacher.delta().flatten(0, 1), full_matrices=False).Vh[:d]
    return _fit_up(S_dn.expand(teacher.shape.tasks, -1, -1), teacher, samples) @ S_dn


def relative_error(teacher: Teacher, estimate_Tmn: Tensor) -> float:
    """Return the expected squared error on fresh samples, over tasks, relative to that of the frozen layer.

    That of the true teacher is `Shape.noise_floor`.
    """
    shape, off = teacher.shape, estimate_Tmn - teacher.delta()
    excess = off.square().sum((1, 2)) + (off @ teacher.means_Tn.unsqueeze(-1)).square().sum((1, 2))
    return (excess.mean().item() + shape.m * shape.noise_variance) / shape.frozen_error


def expected_known_down_error(shape: Shape, samples: int) -> float:
    """Return the expected `relative_error` of `known_down_estimate` for N > r + 1 samples.

    Least squares on r normal inputs has the excess error m σ² r / (N - r - 1).
    """
    excess = shape.m * shape.noise_variance * shape.r / (samples - shape.r - 1)
    return shape.noise_floor + excess / shape.frozen_error


def check_cosines(teacher: Teacher) -> float:
    """Return how far the principal cosines are from the dials.

    Raises:
        UserError: It is more than 1e-6.
    """
    if (off := cosine_error(teacher)) > MAX_COSINE_ERROR:
        raise UserError(
            f"principal cosines are off by {off:.1e}, more than {MAX_COSINE_ERROR:.0e}; do not use the teacher."
        )
    return off


def check_teacher(teacher: Teacher, samples: Samples) -> dict[str, float]:
    """Check a teacher before students are trained on it, as the protocol asks.

    Returns:
        The largest error of a principal cosine, and the relative errors of the closed-form solutions.

    Raises:
        UserError: The cosines are off by more than 1e-6, or the solution with known down projections has not reached
            the noise floor.
    """
    shape, count = teacher.shape, len(samples.task_X) // teacher.shape.tasks
    off = check_cosines(teacher)
    reached = relative_error(teacher, known_down_estimate(teacher, samples))
    expected = expected_known_down_error(shape, count)
    if reached - shape.noise_floor > MAX_FLOOR_RATIO * (expected - shape.noise_floor) + 1e-9:
        raise UserError(
            f"the closed-form solution has the error {reached:.4f}, and {expected:.4f} is expected with {count} "
            f"samples per task and the noise floor {shape.noise_floor}; samples and teacher do not belong together."
        )
    own = per_task_estimate(teacher, samples)
    return {
        "cosine_error": off,
        "known_down": reached,
        "per_task": relative_error(teacher, own),
        "shared": relative_error(teacher, shared_estimate(teacher, samples, shape.r, own)),
        "known_shared": relative_error(teacher, known_shared_estimate(teacher, samples, shape.r)),
    }


def _fit_up(down_Tdn: Tensor, teacher: Teacher, samples: Samples) -> Tensor:
    """Fit the residuals by least squares on D_t x, and return the up projections [T, m, d]."""
    y_TNm = torch.unflatten(residuals(teacher, samples), 0, (teacher.shape.tasks, -1))
    z_TNd = by_task(samples, teacher) @ down_Tdn.mT
    return torch.stack([_least_squares(z, y).T for z, y in zip(z_TNd, y_TNm, strict=True)])


def _least_squares(x_Nn: Tensor, y_Nm: Tensor) -> Tensor:
    """Return the least-squares solution [n, m]; that of smallest norm if there are fewer samples than inputs."""
    if len(x_Nn) < x_Nn.shape[1]:
        return x_Nn.T @ torch.cholesky_solve(y_Nm, torch.linalg.cholesky(x_Nn @ x_Nn.T))
    return torch.cholesky_solve(x_Nn.T @ y_Nm, torch.linalg.cholesky(x_Nn.T @ x_Nn))
