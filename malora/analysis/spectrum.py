"""Singular values of a module's experts (Figure 3 of the paper).

Shapes: N experts, r rank, n coordinates of a row (inputs of the layer, or outputs for up projections).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from malora.analysis.experts import Experts, extract_experts, projections


class Spectrum(NamedTuple):
    """Singular values of a module's experts, stacked to [N·r, n].

    Attributes:
        module: Name of the module in the base model.
        projection: "A" for down projections, "B" for up projections.
        values: All min(N·r, n) singular values in descending order, zeros included.
    """

    module: str
    projection: str
    values: list[float]

    def share_above(self, threshold: float) -> float:
        """Compute the share of the values that are larger than the threshold."""
        return sum(value > threshold for value in self.values) / len(self.values)

    @property
    def stable_rank(self) -> float | None:
        """‖M‖²_F / ‖M‖²_2; None for a zero matrix."""
        return sum((value / self.values[0]) ** 2 for value in self.values) if self.values[0] else None

    @property
    def effective_rank(self) -> float | None:
        """Exponential of the entropy of the normalised values (Roy and Vetterli 2007).

        It is None for a zero matrix.
        """
        shares = [value / sum(self.values) for value in self.values if value > 0]
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else None


def spectra(model: nn.Module | Experts, adapter: str = "default") -> list[Spectrum]:
    """Compute the singular values of the stacked experts (Figure 3).

    They are computed for each module and projection. If the experts share S, at most d values are not zero.

    Raises:
        ValueError: No module has such an adapter, or a value is not finite.
    """
    return [
        Spectrum(module, projection, torch.linalg.svdvals(stacked.flatten(0, 1)).tolist())
        for module, factors in extract_experts(model, adapter).items()
        for projection, stacked, _ in projections(factors)
    ]
