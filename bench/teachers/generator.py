"""Teachers whose tasks have a given principal cosine, and noisy samples of them.

    A*_t = C_t (√ρ Uᵀ + √(1-ρ) V_tᵀ)

U and all V_t have orthonormal columns and are orthogonal to each other, and C_t is a random orthogonal matrix. All
principal cosines between the row spaces of A*_t and A*_u are then exactly ρ, for every pair of tasks. The up
projections B*_t have orthonormal columns, are built alike, and have a ρ of their own.

Inputs of task t are normal with mean μ_t and identity covariance. The means let a router tell the tasks apart. They are
orthogonal to each other and to all A*_t, so a mean has no effect on a teacher's output.

A seed draws the same U, V_t, C_t, means, inputs and noise for every value of the dials. Results are then paired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.errors import UserError

# Streams of random numbers of one seed, so that another number of samples does not change the teacher.
_TEACHER, TRAINING, VALIDATION, TEST, ORDER = range(5)
_STREAMS = 8  # more than there are streams


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer and of its teachers.

    Attributes:
        n, m: Inputs and outputs of the layer.
        r: Rank of a task's change.
        tasks: Number of tasks, T.
        separation: Norm of each task's mean input; the deviation of an input from it has variance 1 in every direction.
        explained: Share of the residual's variance that the teacher explains; the rest is noise.
    """

    tasks: int
    n: int = 576
    m: int = 576
    r: int = 8
    separation: float = 8.0
    explained: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.explained <= 1:
            raise UserError(f"explained={self.explained} must be above 0 and at most 1.")
        bases = self.r * (self.tasks + 1)
        if bases + self.tasks > self.n or bases > self.m:
            raise UserError(
                f"{self.tasks} tasks of rank {self.r} need {bases + self.tasks} orthogonal inputs and {bases} outputs, "
                f"and the layer has {self.n} and {self.m}; take fewer tasks or a lower rank."
            )

    @property
    def teacher_norm2(self) -> float:
        """Squared Frobenius norm of a task's change: both of its factors have r orthonormal vectors."""
        return float(self.r)

    @property
    def noise_variance(self) -> float:
        """Variance σ² of the noise of each output, so that the teacher explains its share of the residual."""
        return self.teacher_norm2 / self.m * (1 - self.explained) / self.explained

    @property
    def frozen_error(self) -> float:
        """Expected squared error of the frozen layer, summed over outputs: the teacher's norm and the noise."""
        return self.teacher_norm2 + self.m * self.noise_variance

    @property
    def noise_floor(self) -> float:
        """Expected squared error of the true teacher, relative to that of the frozen layer."""
        return 1 - self.explained


def predicted_crossover(shape: Shape, samples: int) -> float:
    """Return ρ* = 1 - σ² r n / (N ‖Δ‖²), above which sharing is predicted to pay."""
    return 1 - shape.noise_variance * shape.r * shape.n / (samples * shape.teacher_norm2)


@dataclass(frozen=True)
class Teacher:
    """The tasks of one seed.

    Attributes:
        shape: Sizes.
        rho_down, rho_up: Principal cosines between tasks.
        down_Trn: A*_t with orthonormal rows, float64.
        up_Tmr: B*_t with orthonormal columns, float64.
        means_Tn: Mean input of each task, float64.
    """

    shape: Shape
    rho_down: float
    rho_up: float
    down_Trn: Tensor
    up_Tmr: Tensor
    means_Tn: Tensor

    def delta(self) -> Tensor:
        """Return ΔW*_t, [T, m, n]."""
        return self.up_Tmr @ self.down_Trn


def random_numbers(seed: int, stream: int) -> torch.Generator:
    """Return the CPU generator of one stream of a seed, so that a GPU gets the same numbers."""
    return torch.Generator().manual_seed(seed * _STREAMS + stream)


def make_teacher(shape: Shape, rho_down: float, rho_up: float, seed: int) -> Teacher:
    """Draw the tasks of a seed.

    Raises:
        UserError: A dial is outside of 0 to 1.
    """
    for name, rho in (("rho_down", rho_down), ("rho_up", rho_up)):
        if not 0 <= rho <= 1:
            raise UserError(f"{name}={rho} is a cosine between tasks; it must be from 0 to 1.")
    generator = random_numbers(seed, _TEACHER)
    bases = shape.r * (shape.tasks + 1)
    inputs = _orthonormal(shape.n, bases + shape.tasks, generator)
    outputs = _orthonormal(shape.m, bases, generator)
    down = _blend(inputs[:, :bases], shape, rho_down, generator)
    up = _blend(outputs, shape, rho_up, generator).mT
    return Teacher(shape, rho_down, rho_up, down, up, shape.separation * inputs[:, bases:].T)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix with orthonormal columns, float64."""
    columns_Q: Tensor = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q
    return columns_Q


def _blend(bases: Tensor, shape: Shape, rho: float, generator: torch.Generator) -> Tensor:
    """Return C_t (√ρ Uᵀ + √(1-ρ) V_tᵀ), [T, r, n], for U and all V_t side by side in `bases` [n, r·(T + 1)]."""
    shared, *own = bases.split(shape.r, dim=1)
    rotations = [_orthonormal(shape.r, shape.r, generator) for _ in own]
    return torch.stack(
        [C @ (math.sqrt(rho) * shared + math.sqrt(1 - rho) * V).T for C, V in zip(rotations, own, strict=True)]
    )


def principal_cosines(spaces_Trn: Tensor) -> Tensor:
    """Compute the principal cosines of every pair of different tasks, [T·(T - 1)/2, r].

    Args:
        spaces_Trn: Matrices with orthonormal rows.
    """
    first, second = torch.triu_indices(len(spaces_Trn), len(spaces_Trn), offset=1)
    cosines: Tensor = torch.linalg.svdvals(spaces_Trn[first] @ spaces_Trn[second].mT)
    return cosines


def cosine_error(teacher: Teacher) -> float:
    """Return how far the measured principal cosines are from the dials; the larger one of down and up."""
    sides = ((teacher.down_Trn, teacher.rho_down), (teacher.up_Tmr.mT, teacher.rho_up))
    return max((principal_cosines(space) - rho).abs().max().item() for space, rho in sides)


def shared_energy(teacher: Teacher, d: int) -> float:
    """Return the share of ‖A*_t‖², over all tasks, in the best d-dimensional space of inputs.

    For d = r and T tasks it is (1 + (T - 1) ρ) / T.
    """
    energy = torch.linalg.svdvals(teacher.down_Trn.flatten(0, 1)).square()
    return float(energy[:d].sum() / energy.sum())


@dataclass(frozen=True)
class Samples:
    """Inputs and noise of a seed, the same for every value of the dials; task by task.

    Attributes:
        x_Xn: Inputs of all T·N samples, float32.
        noise_Xm: Noise with variance σ², float32.
        task_X: Task of each sample, int64.
    """

    x_Xn: Tensor
    noise_Xm: Tensor
    task_X: Tensor


def draw_samples(teacher: Teacher, samples: int, seed: int, stream: int = TRAINING) -> Samples:
    """Draw this many samples of each task.

    Args:
        teacher: Teacher of the seed; only its means and sizes are used.
        samples: Samples per task, N.
        seed: Seed.
        stream: TRAINING, VALIDATION or TEST.
    """
    shape, generator = teacher.shape, random_numbers(seed, stream)
    task_X = torch.arange(shape.tasks).repeat_interleave(samples)
    x_Xn = torch.randn(len(task_X), shape.n, generator=generator)
    x_Xn += teacher.means_Tn.float()[task_X]
    noise_Xm = torch.randn(len(task_X), shape.m, generator=generator) * math.sqrt(shape.noise_variance)
    return Samples(x_Xn, noise_Xm, task_X)


def residuals(teacher: Teacher, samples: Samples) -> Tensor:
    """Compute y - W x = ΔW*_t x + σ ε of each sample, [T·N, m], float64."""
    x_TNn = by_task(samples, teacher)
    return (x_TNn @ teacher.delta().mT).flatten(0, 1) + samples.noise_Xm


def by_task(samples: Samples, teacher: Teacher) -> Tensor:
    """Return the inputs of each task, [T, N, n], float64."""
    return torch.unflatten(samples.x_Xn.double(), 0, (teacher.shape.tasks, -1))
