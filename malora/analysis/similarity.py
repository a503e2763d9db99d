"""What is inside trained adapters: how alike their experts are (Figure 2), their spectra (3), how far S_A moved.

`means(similarities(model))` is MT of Figure 2, `means(similarities(one, another))` with a model of another seed ST(S),
of another task ST(D). A model has MALoRA's experts, or PEFT's LoRA, each module of which counts as one expert. For a
model may stand what `experts` took out of it, before training say, or `saved_experts` out of a folder.

Side "A" is an expert's down side multiplied out, [r, n]; side "B" its up side transposed, [r, m], without the scaling.
All in float64 on the CPU. Shapes: n coordinates of a row, p and q ranks compared, N experts, d rank of S.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import Tensor, nn

from malora.analysis.experts import Experts, experts, paired_experts, sides

_POWERS = {"mean": 1, "mean_square": 2}  # what `statistic` may be
_DRAWS = 4000  # over the rank, whose draw is a mean of as many: a standard error of 1.2% for rank 1, 0.4% for rank 8


class Similarity(NamedTuple):
    """Expert i of a model, and j of the same or of another.

    A statistic of their correlations is "mean", or "mean_square" (Kornblith et al.'s R²_CCA); it is None where one of
    them is zero, as an untrained B is.
    """

    module: str
    side: str
    i: int
    j: int
    correlations: list[float]  # canonical, descending; none where one is zero
    ranks: tuple[int, int]
    dimensions: int  # in which these experts can lie

    def value(self, statistic: str = "mean") -> float | None:
        _check_statistic(statistic)
        return float(np.mean(np.power(self.correlations, _POWERS[statistic]))) if self.correlations else None

    def chance(self, statistic: str = "mean") -> float | None:
        """The value to be expected of random matrices of these ranks."""
        return chance_level(*self.ranks, self.dimensions, statistic) if self.correlations else None


class Spectrum(NamedTuple):
    """Singular values of a module's experts stacked to [N·r, n], descending: min(N·r, n) of them, zeros included."""

    module: str
    side: str
    values: list[float]

    def share_above(self, threshold: float) -> float:
        return sum(value > threshold for value in self.values) / len(self.values)

    @property
    def stable_rank(self) -> float | None:
        """‖M‖²_F / ‖M‖²_2; None for a zero matrix."""
        return sum((value / self.values[0]) ** 2 for value in self.values) if self.values[0] else None

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of the values' shares of their sum (Roy and Vetterli 2007); None for a zero matrix."""
        shares = [value / sum(self.values) for value in self.values if value > 0]
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else None


class Movement(NamedTuple):
    module: str
    expert: int | None  # None for a matrix that the experts share
    relative: float  # ‖now − start‖_F / ‖start‖_F
    angles: list[float]  # principal angles between both row spaces, radians, descending


def canonical_correlations(X: Tensor, Y: Tensor, *, centred: bool = False) -> Tensor:
    """Canonical correlations of X [p, n] and Y [q, n], descending: [min(rank X, rank Y)], empty if one is zero.

    Rows are variables and the n coordinates their observations: these are the singular values of Qxᵀ Qy for orthonormal
    bases [n, ·] of the row spaces, the cosines of the principal angles. Invertible mixing of rows does not change them.
    Whether the figure centred is not known. The default does not: a network's unit is not a draw of anything, and the
    QR formula of Kornblith et al. 2019 (arXiv 1905.00414) does not either. `centred=True` subtracts each row's mean, as
    scikit-learn's CCA and SVCCA's do. Where rows have a mean near zero they hardly differ.
    """
    if X.dim() != 2 or Y.dim() != 2 or X.shape[1] != Y.shape[1]:
        raise ValueError(f"X {[*X.shape]} and Y {[*Y.shape]} must be [p, n] and [q, n], of modules of the same size.")
    return torch.linalg.svdvals(_row_basis(X, centred) @ _row_basis(Y, centred).T).clamp(max=1)


@cache
def chance_level(p: int, q: int, n: int, statistic: str = "mean") -> float:
    """What a statistic of the canonical correlations is expected to be for random row spaces of ranks p and q.

    n counts the dimensions that rows can lie in: the coordinates, one less if centred; d over a shared S. "mean_square"
    is exactly max(p, q) / n; "mean", here simulated from a fixed seed, is near 0.85 √(p / n) for p = q ≪ n. Figure 2's
    B, 0.006 to 0.015 read off, is below that of the mean, 0.037 for ranks 8 in 4096: likely it shows the mean square.

    Raises:
        ValueError: a rank that does not fit in n, or an unknown statistic.
    """
    _check_statistic(statistic)
    if not 1 <= min(p, q) <= max(p, q) <= n:
        raise ValueError(f"ranks p={p} and q={q} must be from 1 to n={n}, the dimensions that hold them.")
    if statistic == "mean_square":
        return max(p, q) / n
    # Turned so that Y's rows are the first q axes. Of the other n - q coordinates of a Gaussian X only the QR triangle
    # matters: χ of falling degrees of freedom, Gaussian above (Bartlett 1933). So nothing of size n is drawn.
    random, draws, k = np.random.default_rng(0), math.ceil(_DRAWS / min(p, q)), min(p, n - q)
    triangle = np.triu(random.standard_normal((draws, k, p)))
    triangle[:, range(k), range(k)] = np.sqrt(random.chisquare(n - q - np.arange(k), (draws, k)))
    basis = np.linalg.qr(np.concatenate([random.standard_normal((draws, q, p)), triangle], axis=1)).Q
    return float(np.linalg.svd(basis[:, :q], compute_uv=False).mean())


def _check_statistic(statistic: str) -> None:
    if statistic not in _POWERS:
        raise ValueError(f"statistic={statistic!r} is unknown; choose one of {', '.join(map(repr, _POWERS))}.")


def similarities(
    model: nn.Module | Experts, other: nn.Module | Experts | None = None, adapter: str = "default", *,
    centred: bool = False,
) -> list[Similarity]:  # fmt: skip
    """Every two experts i < j of each module, or every i with every j of the same module of another model (Figure 2).

    Experts over a shared S lie in its row space whatever they learn, so within a model their chance level is that of d
    dimensions. Equation 9 starts them above it, as every P_t leans to the same rows of S, and models of one seed start
    with the same A: compare with the start.

    Raises:
        ValueError: no such adapter, one expert and no other model, or models that adapt different modules or sizes.
    """
    records = []
    for module, factors, others in paired_experts(model, model if other is None else other, adapter):
        for (side, one, shared), (_, another, _) in zip(sides(factors), sides(others), strict=True):
            n = shared if shared and other is None else one.shape[-1] - centred
            bases, more = ([*enumerate(_row_basis(X, centred) for X in stacked)] for stacked in (one, another))
            for (i, X), (j, Y) in combinations(bases, 2) if other is None else product(bases, more):
                correlations = torch.linalg.svdvals(X @ Y.T).tolist()
                records.append(Similarity(module, side, i, j, correlations, (len(X), len(Y)), n))
    if not records:
        raise ValueError(f"adapter {adapter!r} has one expert a module; give another model to compare it with.")
    return records


def means(records: list[Similarity], statistic: str = "mean") -> dict[str, tuple[float, float] | None]:
    """Value and chance level by side, means over modules and pairs: the bars of Figure 2, and the floor under each."""
    by_side: dict[str, list] = {record.side: [] for record in records}
    for record in (record for record in records if record.correlations):
        by_side[record.side].append((record.value(statistic), record.chance(statistic)))
    return {side: tuple(np.mean(rows, axis=0).tolist()) if rows else None for side, rows in by_side.items()}


def spectra(model: nn.Module | Experts, adapter: str = "default") -> list[Spectrum]:
    """Singular values of the stacked experts by module and side (Figure 3). With a shared S at most d are not zero."""
    return [
        Spectrum(module, side, torch.linalg.svdvals(stacked.flatten(0, 1)).tolist())
        for module, factors in experts(model, adapter).items()
        for side, stacked, _ in sides(factors)
    ]


def movement(
    model: nn.Module | Experts, start: nn.Module | Experts, adapter: str = "default", *, factor: str = "S"
) -> list[Movement]:
    """How far a factor ("S", "A", "P", ... of `Factors`) moved, by module, and by expert where each has its own.

    A saved adapter does not keep its start: take it before training, or build it again with the same seed, base and
    config. Another LAPACK may flip the sign of S's rows; `relative` counts that as movement, `angles` do not. Nor do
    they see S's rows mixed.

    Raises:
        ValueError: no such adapter or factor, models that differ in shape, or a start at zero.
    """
    records = []
    for module, *both in paired_experts(model, start, adapter):
        new, old = (factors._asdict().get(factor) for factors in both)
        if new is None or old is None or new.shape != old.shape or not old.any():
            there = {name: [*tensor.shape] for name, tensor in both[0]._asdict().items() if tensor is not None}
            raise ValueError(f"factor={factor!r} must be in both, of one shape, not zero at first; {module}: {there}.")
        for t, a, b in [(None, new, old)] if new.dim() == 2 else zip(range(len(new)), new, old, strict=True):
            together = torch.linalg.qr(torch.cat([a, b]).T).Q  # [n, up to 2d]; angles are the same in fewer dimensions
            # Accurate near zero, as arccos is not.
            angles = subspace_angles((a @ together).T.numpy(), (b @ together).T.numpy()).tolist()
            records.append(Movement(module, t, ((a - b).norm() / b.norm()).item(), angles))
    return records


def _row_basis(X: Tensor, centred: bool) -> Tensor:
    """Orthonormal rows [rank, n] with the row space of X [p, n]."""
    X = X.detach().to("cpu", torch.float64)
    _, sigma, V = torch.linalg.svd(X - X.mean(1, keepdim=True) if centred else X, full_matrices=False)
    return V[sigma > sigma[0] * max(X.shape) * torch.finfo(X.dtype).eps]
