"""Base product and up side as one: h lies beside x, and B beside the frozen W.

y = x Wᵀ + h B is [x h] [W Bᵀ]ᵀ, a product whose sums are a little longer, where two products pass over y three times.
For that, frozen weights move into rows that have room for B; their values and modules stay. A row of x has room for the
h of all siblings, so a later sibling's weight has zeros where the h of those before it lie.

Shapes: T tokens, n in, m out, G siblings, H total rank of a sibling's experts, a multiple of 8.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from malora.backends.lanes import side_by_side

if TYPE_CHECKING:
    from malora.layer import MaloraLayer

LEAST = 1 << 23  # elements of siblings' weights; steps of models with smaller ones are bound by launches


def pays(layers: list[MaloraLayer]) -> bool:
    """Whether passes over the outputs that are saved outweigh the one that writes x anew, by sizes alone.

    Not by numbers of tokens: what a CUDA graph has captured must not move when a larger batch comes.
    """
    n, outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
    is_family = len(layers) == len(layers[0].siblings.layers)
    return is_family and n % 8 == 0 and outputs >= 2 * n and n * outputs >= LEAST


def weights(layers: list[MaloraLayer], H: int, dtype: torch.dtype) -> list[Tensor] | None:
    """Of sibling g, [m, n + (g + 1)·H]: W, zeros, and room for Bᵀ at the end. None if not all can have that."""
    found = [_with_room(layer, (g + 1) * H, dtype) for g, layer in enumerate(layers)]
    return None if any(whole is None for whole in found) else found


def _with_room(layer: MaloraLayer, columns: int, dtype: torch.dtype) -> Tensor | None:
    """Room is made once: who then moves or exchanges a weight may do so again."""
    rooms, base, W = layer.siblings.rooms, layer.base_layer, layer.base_layer.weight
    m, n = W.shape
    if id(layer) not in rooms:
        is_its_own = W.is_contiguous() and W.untyped_storage().nbytes() == W.nbytes
        if type(W) is not nn.Parameter or not is_its_own or hasattr(base, "_hf_hook") or W.dtype != dtype:
            return None
        if torch.is_inference_mode_enabled() or (W.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None  # a weight made there could not be used elsewhere
        whole = W.new_zeros(m, n + columns)
        whole[:, :n] = W
        if W.is_cuda:  # this stream may still read what is freed, and what it was allocated on not know of that
            W.data.record_stream(torch.cuda.current_stream(W.device))
        W.data = whole[:, :n]
        rooms[id(layer)] = whole
    whole = rooms[id(layer)]
    if whole is not None and (whole.data_ptr(), whole.stride()) != (W.data_ptr(), W.stride()):
        rooms[id(layer)] = whole = None
    return whole if whole is not None and (whole.shape, whole.dtype) == ((m, n + columns), dtype) else None


def fill(wholes: list[Tensor], Bs: list[Tensor], alpha: float) -> None:
    """Writes alpha · Bᵀ of B [H, m] into the room of each weight."""
    for whole, B in zip(wholes, Bs, strict=True):
        H, m = B.shape
        grid = (triton.cdiv(m, 128), triton.cdiv(H, 64))
        _fill_kernel[grid](B, whole[:, -H:], H, m, whole.stride(0), SCALE=alpha, BLOCK_H=64, BLOCK_M=128)


def outputs(xh: Tensor, wholes: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """x Wᵀ + bias + alpha · h B of each sibling, [T, m], of x and h in rows [T, n + G·H]."""

    def output(whole: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(xh[:, : whole.shape[1]], whole, None if bias is None else bias.to(xh.dtype))

    return side_by_side(xh, [partial(output, *of_each) for of_each in zip(wholes, biases, strict=True)])


@triton.jit
def _fill_kernel(B_ptr, room_ptr, H, m, room_stride, SCALE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr):
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    rank_inside, output_inside = ranks < H, outputs < m
    B = tl.load(B_ptr + ranks[:, None] * m + outputs[None, :], mask=rank_inside[:, None] & output_inside[None, :])
    place = room_ptr + outputs[:, None] * room_stride + ranks[None, :]
    tl.store(place, tl.trans(B) * SCALE, mask=output_inside[:, None] & rank_inside[None, :])
