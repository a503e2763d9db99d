"""Distance between a factor and its start, for example of S after training.

Angles need SciPy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from malora.analysis.experts import Experts, paired_experts


class Movement(NamedTuple):
    """Distance of one matrix from its start.

    Attributes:
        module: Name of the module in the base model.
        expert: Index of the expert; None for a matrix that the experts share.
        relative: ‖now − start‖_F / ‖start‖_F.
        angles: Principal angles between the two row spaces in radians, in descending order.
    """

    module: str
    expert: int | None
    relative: float
    angles: list[float]


def movement(
    model: nn.Module | Experts, start: nn.Module | Experts, adapter: str = "default", *, factor: str = "S"
) -> list[Movement]:
    """Measure how far a factor moved in each module.

    If each expert has its own factor, the result is for each expert too.

    A saved adapter does not contain its start. Call `extract_experts` before training, or build the adapter again with
    the same seed, base model and config. Another LAPACK may flip the sign of rows of S. `relative` counts that as
    movement. `angles` do not, and they ignore mixing of the rows too.

    Args:
        model: Model, or its experts, after training.
        start: Model, or its experts, before training.
        adapter: Name of the adapter in both.
        factor: Field of `malora.factors.Factors`: "A", "P", "S", "B", "Q" or "S_B".

    Raises:
        ImportError: SciPy is not installed.
        ValueError: There is no such adapter or factor, the models differ in shape, or the factor started at zero.
    """
    records = []
    for module, *both in paired_experts(model, start, adapter):
        now, before = (factors._asdict().get(factor) for factors in both)
        if now is None or before is None or now.shape != before.shape or not before.any():
            shapes = {name: [*tensor.shape] for name, tensor in both[0]._asdict().items() if tensor is not None}
            raise ValueError(f"factor={factor!r} must have one shape and not start at zero; {module} has {shapes}.")
        matrices = [(None, now, before)] if now.dim() == 2 else zip(range(len(now)), now, before, strict=True)
        for expert, a, b in matrices:
            relative = ((a - b).norm() / b.norm()).item()
            records.append(Movement(module, expert, relative, _principal_angles(a, b)))
    return records


def _principal_angles(a: Tensor, b: Tensor) -> list[float]:
    """Compute the principal angles between the row spaces of two [d, n] matrices.

    They are in radians, descending.
    """
    try:
        from scipy.linalg import subspace_angles
    except ImportError as error:
        raise ImportError("malora.analysis.movement needs SciPy: pip install 'malora[analysis]'") from error
    # In a basis of both row spaces, [n, up to 2d], the angles are the same and the matrices are smaller.
    basis = torch.linalg.qr(torch.cat([a, b]).T).Q
    # SciPy's function is accurate near zero, where the arc cosine of a singular value is not.
    angles: list[float] = subspace_angles((a @ basis).T.numpy(), (b @ basis).T.numpy()).tolist()
    return angles
