"""Similarity of experts by canonical correlation analysis (Figure 2 of the paper).

Shapes: N experts, n coordinates of a row, p and q ranks of two matrices that are compared, d rank of S.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from malora.analysis.experts import Experts, paired_experts, projections

# Statistics of canonical correlations: each is the mean of this power.
_POWERS = {"mean": 1, "mean_square": 2}
# Random draws for a chance level, times the rank: a draw of rank p is itself a mean of p correlations. The standard
# error is then 1.2% for rank 1 and 0.4% for rank 8.
_DRAWS = 4000


class Similarity(NamedTuple):
    """Similarity of expert i of a model and expert j of the same or another model.

    Attributes:
        module: Name of the module in the base model.
        projection: "A" for down projections, "B" for up projections.
        i: Index of the first expert.
        j: Index of the second expert.
        correlations: Canonical correlations in descending order; empty if an expert is zero, as an untrained B is.
        ranks: Ranks of both experts.
        dimensions: Number of dimensions in which these experts can lie.
    """

    module: str
    projection: str
    i: int
    j: int
    correlations: list[float]
    ranks: tuple[int, int]
    dimensions: int

    def value(self, statistic: str = "mean") -> float | None:
        """Compute a statistic of the correlations; None if an expert is zero.

        Args:
            statistic: "mean", or "mean_square" (R²_CCA of Kornblith et al. 2019).

        Raises:
            ValueError: The statistic is unknown.
        """
        _check_statistic(statistic)
        return float(np.mean(np.power(self.correlations, _POWERS[statistic]))) if self.correlations else None

    def chance(self, statistic: str = "mean") -> float | None:
        """Compute the expected value for random matrices of these ranks.

        It is None if an expert is zero.

        Raises:
            ValueError: The statistic is unknown.
        """
        return chance_level(*self.ranks, self.dimensions, statistic) if self.correlations else None


def canonical_correlations(X: Tensor, Y: Tensor, *, centred: bool = False) -> Tensor:
    """Compute the canonical correlations of X [p, n] and Y [q, n] in descending order.

    Rows are variables, and their n coordinates are the observations. For orthonormal bases Qx and Qy [n, ·] of the row
    spaces, the correlations are the singular values of Qxᵀ Qy, the cosines of the principal angles. They do not change
    if the rows of X or Y are mixed by an invertible matrix.

    The paper does not say whether its figure centres the rows. By default we do not: a coordinate is a unit of the
    network and not a random sample, and the QR formula of Kornblith et al. 2019 (arXiv 1905.00414) does not centre
    either. CCA in scikit-learn and SVCCA do. The difference is small if the rows have a mean near zero.

    Args:
        X: First matrix, [p, n].
        Y: Second matrix, [q, n].
        centred: Whether to subtract the mean of each row first.

    Returns:
        float64 tensor [min(rank X, rank Y)], empty if X or Y is zero.

    Raises:
        ValueError: X and Y are not matrices with the same number of columns.
    """
    if X.dim() != 2 or Y.dim() != 2 or X.shape[1] != Y.shape[1]:
        raise ValueError(f"X {[*X.shape]} and Y {[*Y.shape]} must be [p, n] and [q, n], of modules of the same size.")
    return _singular_values(_row_basis(X, centred) @ _row_basis(Y, centred).T).clamp(max=1)


@cache
def chance_level(p: int, q: int, n: int, statistic: str = "mean") -> float:
    """Compute the expected statistic of random row spaces' canonical correlations.

    "mean_square" is exactly max(p, q) / n. "mean" is simulated from a fixed seed; for p = q ≪ n it is near
    0.85 √(p / n). In the paper's Figure 2, the values of B (0.006 to 0.015, read off) are below the chance level of
    the mean, which is 0.037 for rank 8 in 4096 dimensions. So the figure probably shows the mean square.

    Args:
        p: Rank of the first matrix.
        q: Rank of the second matrix.
        n: Number of dimensions in which rows can lie: the coordinates (one less if centred), or d over a shared S.
        statistic: "mean" or "mean_square".

    Raises:
        ValueError: A rank is larger than n, or the statistic is unknown.
    """
    _check_statistic(statistic)
    if not 1 <= min(p, q) <= max(p, q) <= n:
        raise ValueError(f"ranks p={p} and q={q} must be from 1 to n={n}, the number of dimensions.")
    if statistic == "mean_square":
        return max(p, q) / n
    # Rotate so that the rows of Y are the first q axes. Of the other n - q coordinates of a Gaussian X only the QR
    # triangle matters: χ-distributed with falling degrees of freedom on the diagonal, Gaussian above it (Bartlett
    # 1933). So nothing of size n is drawn.
    random, draws, k = np.random.default_rng(0), math.ceil(_DRAWS / min(p, q)), min(p, n - q)
    triangle = np.triu(random.standard_normal((draws, k, p)))
    triangle[:, range(k), range(k)] = np.sqrt(random.chisquare(n - q - np.arange(k), (draws, k)))
    basis = np.linalg.qr(np.concatenate([random.standard_normal((draws, q, p)), triangle], axis=1)).Q
    return float(np.linalg.svd(basis[:, :q], compute_uv=False).mean())


def similarities(
    model: nn.Module | Experts, other: nn.Module | Experts | None = None, adapter: str = "default", *,
    centred: bool = False,
) -> list[Similarity]:  # fmt: skip
    """Compare the experts of each module in pairs (Figure 2).

    Compare every two experts of one model, or every expert with every expert of another model.

    Experts over a shared S lie in its row space whatever they learn. Within a model their chance level is therefore
    that of d dimensions. Their similarity starts above it, because by equation 9 every P_t emphasises the same rows of
    S. Models of the same seed start with the same A. So compare with the similarity before training too.

    Args:
        model: Model, or its experts.
        other: Another model, or its experts, with the same adapted modules. None compares experts i < j of `model`.
        adapter: Name of the adapter in both.
        centred: As in `canonical_correlations`.

    Raises:
        ValueError: There is no such adapter, there is one expert and no other model, or the models adapt different
            modules or modules of different sizes.
    """
    records = []
    for module, factors, others in paired_experts(model, model if other is None else other, adapter):
        for (projection, one, shared), (_, another, _) in zip(projections(factors), projections(others), strict=True):
            dimensions = shared if shared and other is None else one.shape[-1] - centred
            bases, other_bases = ([*enumerate(_row_basis(X, centred) for X in stack)] for stack in (one, another))
            for (i, X), (j, Y) in combinations(bases, 2) if other is None else product(bases, other_bases):
                correlations = _singular_values(X @ Y.T).tolist()
                records.append(Similarity(module, projection, i, j, correlations, (len(X), len(Y)), dimensions))
    if not records:
        raise ValueError(f"adapter {adapter!r} has one expert per module; give another model to compare it with.")
    return records


def means(records: list[Similarity], statistic: str = "mean") -> dict[str, tuple[float, float] | None]:
    """Compute the mean value and the mean chance level of each projection.

    These are the bars of Figure 2. Means are over modules and pairs of experts. A projection whose experts are all zero
    is None.

    Raises:
        ValueError: The statistic is unknown.
    """
    pairs: dict[str, list[tuple[float, float]]] = {record.projection: [] for record in records}
    for record in records:
        value, chance = record.value(statistic), record.chance(statistic)
        if value is not None and chance is not None:
            pairs[record.projection].append((value, chance))
    return {projection: _mean_pair(found) if found else None for projection, found in pairs.items()}


def _mean_pair(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    value, chance = np.mean(pairs, axis=0).tolist()
    return value, chance


def _check_statistic(statistic: str) -> None:
    if statistic not in _POWERS:
        raise ValueError(f"statistic={statistic!r} is unknown; choose one of {', '.join(map(repr, _POWERS))}.")


def _singular_values(matrix: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def _row_basis(X: Tensor, centred: bool) -> Tensor:
    """Compute orthonormal rows [rank, n], float64, with the row space of X [p, n]."""
    X = X.detach().to("cpu", torch.float64)
    _, sigma, V = torch.linalg.svd(X - X.mean(1, keepdim=True) if centred else X, full_matrices=False)
    basis: Tensor = V[sigma > sigma[0] * max(X.shape) * torch.finfo(X.dtype).eps]
    return basis
