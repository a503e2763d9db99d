"""Base product and up side as one: h lies beside x, and B beside the frozen W.

y = x Wᵀ + h B is [x h] [W Bᵀ]ᵀ, a product whose sums are a little longer, where two products pass over y three times.
For that, frozen weights move into rows that have room for B; their values and modules stay. A row of x has room for the
h of all siblings, so a later sibling's weight has zeros where the h of those before it lie; an h that is infinite makes
its siblings' outputs NaN. B is rounded after it is scaled.

Shapes: T tokens, n in, m out, G siblings, H total rank of a sibling's experts, a multiple of 8.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora.fused.kernels.down_tiling import aligned_rows
from malora.fused.streams import run_on_parallel_streams
from malora.fused.tensor_utils import is_captured

if TYPE_CHECKING:
    from malora.layer import MaloraLayer


MIN_ELEMENTS = 1 << 23  # elements of siblings' weights; steps of models with smaller ones are bound by launches


def is_profitable(layers: list[MaloraLayer]) -> bool:
    """Whether passes over the outputs that are saved outweigh the one that writes x anew, by sizes alone.

    Not by numbers of tokens: what a CUDA graph has captured must not move when a larger batch comes.
    """
    n, outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
    is_family = len(layers) == len(layers[0].group.layers)
    return is_family and n % 8 == 0 and outputs >= 2 * n and n * outputs >= MIN_ELEMENTS


def weights(layers: list[MaloraLayer], H: int, dtype: torch.dtype) -> list[Tensor] | None:
    """Of sibling g, [m, n + (g + 1)·H]: W, zeros, and room for Bᵀ at the end. None if not all can have that.

    Room is made once, for one H. Where somebody moves or exchanges a weight afterwards, the family does without.
    """
    rooms = layers[0].group.rooms
    if not rooms and all(_can_move(layer, dtype) for layer in layers):
        for g, layer in enumerate(layers):
            _move(layer.base_layer.weight, (g + 1) * H)
            rooms[id(layer)] = (g + 1) * H
    found = [whole(layer) for layer in layers]
    fits = [W is not None and W.shape[1] == layers[0].in_features + (g + 1) * H for g, W in enumerate(found)]
    return found if all(fits) and found[0].dtype == dtype else None


def _can_move(layer: MaloraLayer, dtype: torch.dtype) -> bool:
    """Whether a weight is the layer's alone, and stays where it is put."""
    base, W = layer.base_layer, layer.base_layer.weight
    is_its_own = type(W) is nn.Parameter and W.is_contiguous() and W.untyped_storage().nbytes() == W.nbytes
    # A tensor that is made in inference mode could not be trained with, and a graph would move it again in each replay.
    is_time = not (torch.is_inference_mode_enabled() or is_captured(W))
    return is_its_own and is_time and W.dtype == dtype and not hasattr(base, "_hf_hook")


def _move(W: nn.Parameter, columns: int) -> None:
    """Into rows with so many columns beside it; 0 takes it back."""
    m, n = W.shape
    moved = W.new_zeros(m, n + columns)
    moved[:, :n] = W.detach()
    if W.is_cuda:  # this stream may still read what is freed, and what it was allocated on not know of that
        W.data.record_stream(torch.cuda.current_stream(W.device))
    W.data = moved[:, :n]


def whole(layer: MaloraLayer) -> Tensor | None:
    """A weight and the columns beside it, while it lies where it was moved."""
    W, columns = layer.base_layer.weight, layer.group.rooms.get(id(layer), 0)
    m, n = W.shape
    stays = W.stride() == (n + columns, 1) and W.untyped_storage().nbytes() == m * (n + columns) * W.element_size()
    return W.data.as_strided((m, n + columns), W.stride()) if columns and stays else None


def take_back(layer: MaloraLayer) -> None:
    """Its weight is plain again, and may get room anew."""
    if whole(layer) is not None:
        _move(layer.base_layer.weight, 0)
    layer.group.rooms.pop(id(layer), None)


def input_with_room(reader: MaloraLayer, like: Tensor) -> Tensor | None:
    """Like torch.empty_like(like), [..., n], but in rows with room for h; None where nobody would use that.

    For what `reader` and its siblings are called with next. Whoever makes it there saves them a copy. They take the
    room once, of this tensor itself and not of another that shares its memory.
    """
    columns = reader.group.columns_beside_input(like)
    if not columns:
        return None
    rows = aligned_rows(like.flatten(0, -2), like.shape[-1] + columns)
    made = _over(rows, rows.unflatten(0, like.shape[:-1])[..., : like.shape[-1]])
    made.has_room = True
    return made


def taken_room(x: Tensor, columns: int) -> Tensor | None:
    """[T, n + columns] in the memory of x [..., n], if it was made with so much room that nobody has taken."""
    n = x.shape[-1]
    if not vars(x).pop("has_room", False) or x.stride(-2) < n + columns:
        return None
    return _over(x, x.detach().flatten(0, -2).as_strided((x.numel() // n, n + columns), (x.stride(-2), 1)))


def _over(x: Tensor, view: Tensor) -> Tensor:
    """A view of x's memory as a tensor of its own: what is written to h is no change of x."""
    return x.new_empty(0).set_(x.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def outputs(xh: Tensor, wholes: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """x Wᵀ + bias + alpha · h B of each sibling, [T, m], of x and h in rows [T, n + G·H]."""

    def output(whole: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(xh[:, : whole.shape[1]], whole, None if bias is None else bias.to(xh.dtype))

    return run_on_parallel_streams(xh, [partial(output, *of_each) for of_each in zip(wholes, biases, strict=True)])
