"""Augmented weights: the base and the up projection of a layer as one GEMM.

    y = x Wᵀ + h B = [x h] [W Bᵀ]ᵀ

Two GEMMs write y, read it and write it again; one GEMM writes it once. For that, each frozen weight is allocated anew
with padded columns, into which Bᵀ is copied. This happens only when the user calls `malora.optimize_backbone(model)`,
and `malora.restore_backbone(model)` takes it back. Values and modules stay the same.

A row [x h] holds the h of all G projections of the group, so the weight of projection g has zeros where the h of the
projections before it lie: [W, 0, Bᵀ] of shape [m, n + (g + 1)·H8]. An h that is infinite therefore makes the outputs
of its whole group NaN. B is rounded after it is scaled.

Shapes: T tokens, n in, m out, G projections, H8 padded total rank of a projection's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from malora.fused.tensor_utils import is_captured

if TYPE_CHECKING:
    from malora.fused.protocol import FusedLayer
    from malora.fused.weight_cache import GroupWeightCache

# Elements of a group's weights. Steps of models with smaller ones are bound by kernel launches.
MIN_ELEMENTS = 1 << 23


def is_profitable(layers: Sequence[FusedLayer]) -> bool:
    """Return whether one GEMM saves more passes over outputs than the copy of x costs.

    The sizes alone decide. The number of tokens does not count: a weight that a CUDA graph has captured must not move
    when a larger batch comes.
    """
    n, outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
    return n % 8 == 0 and outputs >= 2 * n and n * outputs >= MIN_ELEMENTS


def allocate_padding(layers: Sequence[FusedLayer], cache: GroupWeightCache, H8: int) -> bool:
    """Move the weights of a group into memory with padded columns.

    The columns are for an up projection of total rank H8.

    Returns whether they are there now. All weights of the group move, or none does.
    """
    if augmented_weights(layers, cache, H8) is not None:
        return True
    free_padding(layers, cache)
    if not all(_can_move(layer) for layer in layers):
        return False
    for g, layer in enumerate(layers):
        _move(layer.base_layer.weight, (g + 1) * H8)
        cache.padding[g] = (g + 1) * H8
    return True


def free_padding(layers: Sequence[FusedLayer], cache: GroupWeightCache) -> None:
    """Move weights with padded columns back into memory without them."""
    for g, layer in enumerate(layers):
        if _augmented(layer, cache.padding.get(g, 0)) is not None:
            _move(layer.base_layer.weight, 0)
    cache.padding.clear()
    cache.loaded = None  # columns that are allocated anew are zero


def augmented_weights(layers: Sequence[FusedLayer], cache: GroupWeightCache, H8: int) -> list[Tensor] | None:
    """Return the weights of a whole group with their padded columns.

    The weight of projection g is [m, n + (g + 1)·H8].

    Return None if they have none, if those are for another rank, or if a weight was moved or exchanged since.
    """
    if not has_padding(layers, cache, H8):
        return None
    found = [_augmented(layer, cache.padding[g]) for g, layer in enumerate(layers)]
    weights = [W for W in found if W is not None]
    return weights if len(weights) == len(layers) else None


def has_padding(layers: Sequence[FusedLayer], cache: GroupWeightCache, H8: int) -> bool:
    """Return whether the weights of a whole group have padded columns for total rank H8.

    A compiler can trace this. It does not find a weight that lies in other memory of the same strides.
    """
    columns = [(g + 1) * H8 for g in range(len(layers))]
    if cache.padding != dict(enumerate(columns)):
        return False
    weights = [layer.base_layer.weight for layer in layers]
    return all(W.stride(0) == W.shape[1] + count for W, count in zip(weights, columns, strict=True))


def _augmented(layer: FusedLayer, columns: int) -> Tensor | None:
    """Return a weight with its padded columns.

    Return None if it does not lie where `_move` put it.
    """
    W = layer.base_layer.weight
    m, n = W.shape
    stayed = W.stride() == (n + columns, 1) and W.untyped_storage().nbytes() == m * (n + columns) * W.element_size()
    return W.data.as_strided((m, n + columns), W.stride()) if columns and stayed else None


def _can_move(layer: FusedLayer) -> bool:
    """Return whether a weight is the layer's alone, and stays where it is put."""
    base, W = layer.base_layer, layer.base_layer.weight
    is_its_own = type(W) is nn.Parameter and W.is_contiguous() and W.untyped_storage().nbytes() == W.nbytes
    # A tensor made in inference mode could not be trained with, and a graph would move it again in each replay.
    can_allocate = not (torch.is_inference_mode_enabled() or is_captured(W) or W.is_meta)
    return is_its_own and can_allocate and not hasattr(base, "_hf_hook")


def _move(W: Tensor, columns: int) -> None:
    """Move a weight into memory with so many padded columns, or without them."""
    m, n = W.shape
    moved = W.new_zeros(m, n + columns)
    moved[:, :n] = W.detach()
    if W.is_cuda:  # this stream may still read what is freed, and the one that allocated it does not know
        W.data.record_stream(torch.cuda.current_stream(W.device))
    W.data = moved[:, :n]
