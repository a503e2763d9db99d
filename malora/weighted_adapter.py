"""Weighted sums of adapters without a router, for PEFT's `add_weighted_adapter`.

A router's gates depend on the token, so a routed adapter has no single change of a weight that could be summed.
Shapes: n in, m out, r rank.
"""

from __future__ import annotations

from math import copysign, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from malora.factors import Factors

COMBINATIONS = ("cat", "svd", "linear")


class Summand(NamedTuple):
    """An adapter on one layer, with its weight in the sum."""

    weight: float
    scaling: float
    factors: Factors


def combined_rank(kind: str, ranks: list[int], svd_rank: int | None) -> int:
    """Return the rank of the sum of adapters with these ranks.

    Args:
        kind: "cat" is exact, and ranks add up. "svd" is the best approximation of the sum at one rank. "linear" sums
            the factors, which is rough.
        ranks: rank of each adapter.
        svd_rank: rank of "svd"; by default the largest of the ranks.

    Raises:
        ValueError: the kind is unknown, or "linear" would sum factors of different ranks.
    """
    if kind not in COMBINATIONS:
        choices = ", ".join(map(repr, COMBINATIONS))
        raise ValueError(f"combination_type={kind!r} is not supported by malora; choose one of {choices}.")
    if svd_rank is not None and kind != "svd":
        raise ValueError(f"svd_rank={svd_rank} has no effect with combination_type={kind!r}; leave it out.")
    if kind == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"combination_type='linear' sums factors of one rank, not {ranks}; choose 'cat' or 'svd'.")
    return sum(ranks) if kind == "cat" else svd_rank or max(ranks)


def combine(kind: str, summands: list[Summand], rank: int) -> tuple[Tensor, Tensor]:
    """Return the sum as a down projection [r, n] and a transposed up projection [r, m], with scaling 1.

    Args:
        kind: see `combined_rank`.
        summands: the adapters on one layer, each with one expert.
        rank: rank of "svd".
    """
    with torch.no_grad():
        if kind == "svd":
            delta = torch.stack([s.weight * s.factors.delta_weight(s.scaling) for s in summands]).sum(0)
            U, sigma, V = torch.linalg.svd(delta, full_matrices=False)
            return V[:rank], (U * sigma).T[:rank]
        downs = [s.factors.down()[0] for s in summands]
        ups = [s.factors.up()[0] for s in summands]
        scales = [s.weight * s.scaling for s in summands]
        if kind == "cat":
            return torch.cat([scale * down for scale, down in zip(scales, downs, strict=True)]), torch.cat(ups)
        # Either factor gets the root of the weight, and one of them its sign.
        down = torch.stack(
            [copysign(sqrt(abs(scale)), scale) * down for scale, down in zip(scales, downs, strict=True)]
        )
        up = torch.stack([sqrt(abs(scale)) * up for scale, up in zip(scales, ups, strict=True)])
        return down.sum(0), up.sum(0)
