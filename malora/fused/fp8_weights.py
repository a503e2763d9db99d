"""Products in 8 bits: of the frozen weights, and of the up sides beside them.

Both factors of a product are rounded to float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433), each row divided
by a scale of its own that brings its largest magnitude to 448. Weights do not change, so they are rounded once: by
output for the forward pass, and transposed, by input, for the backward pass.

An up side lies beside its frozen weight, as in `beside.py`: y = [x h u] [W (B / u)ᵀ]ᵀ, where u, a number for each rank,
brings B / u into the range of the weight's rows. Adding h B to an 8-bit product would be two passes more over [T, m].
Backward [dx dh] = dy [W Bᵀ] is one product, too: one of dh alone, which there is where x wants no gradient, reads all
of dy once more. All else is as in `fused`: down sides, routers, and the gradients of weights, of x and dy as they come.

Shapes: T tokens, n in, m out, Σm over siblings, H total rank of a sibling's experts, C columns of room for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from malora.fused.availability import warn_once
from malora.fused.kernels.quantize_fp8 import (
    ALIGNMENT,
    Float8Rows,
    UpOperand,
    quantize_rows,
    quantize_up_proj,
    scaled_matmul,
    zero_rows,
)
from malora.fused.streams import run_on_parallel_streams
from malora.fused.tensor_utils import is_captured

# What a row of a weight counts for at least, as a share of the siblings' largest, and in all. The smaller it is, the
# larger is what lies beside x, whose scale is that of all its row.
MIN_ROW_SHARE, MIN_MAGNITUDE = 2.0**-8, 2.0**-64
Work = Callable[[], Any]


class Float8Weights(NamedTuple):
    """The weights of linear maps that read the same input, rounded."""

    source: tuple  # where they were read, and in which version
    room: int  # C
    by_output: list[Float8Rows]  # of map g, [W, zeros, room for its B]: [m, n + (g + 1)·C]
    # Wᵀ of all side by side, and below it room for each B in its map's columns: [n + G·C, Σm]. None until a gradient of
    # the input is asked for.
    by_input: Float8Rows | None

    def beside(self, Bs: list[Tensor], alpha: float, units: Tensor | None = None) -> tuple[Tensor, list[Work]]:
        """The units, [G, C], and works that set one and round alpha · B [H, m] beside the weight, for each map."""
        if units is None:
            units = Bs[0].new_empty(len(Bs), self.room, dtype=torch.float32)
        of_each = zip(self.by_output, Bs, units, strict=True)
        return units, [partial(quantize_up_proj, W, B, alpha, unit) for W, B, unit in of_each]

    def outputs(self, x: Tensor, biases: list[Tensor | None], up: UpOperand | None = None) -> list[Tensor]:
        """x Wᵀ, the bias and h B of each map, for x [T, n]: [T, m].

        Not as columns of one product: Liger's kernels copy what is not contiguous.
        """
        values, scale = quantize_rows([x], up)
        return [
            scaled_matmul(Float8Rows(values[:, : W.values.shape[1]], scale), W, x.dtype, bias)
            for W, bias in zip(self.by_output, biases, strict=True)
        ]

    def gradients(self, dys: list[Tensor], Bs: list[Tensor], alpha: float, puts: bool = True) -> tuple[Tensor, Tensor]:
        """Σ dy W over the maps, [T, n], and alpha · dy Bᵀ of each, [G, T, H], of dy [T, m] and B [H, m].

        Views of one product of Σm terms. Puts B below Wᵀ, unless it is there.
        """
        dy, *_ = run_on_parallel_streams(
            dys[0], [partial(quantize_rows, dys), *(self.below(Bs, alpha) if puts else [])]
        )
        dx, dh = scaled_matmul(dy, self.by_input, dys[0].dtype).tensor_split([-len(Bs) * self.room], 1)
        return dx, dh.unflatten(1, (len(Bs), self.room)).transpose(0, 1)[..., : len(Bs[0])]

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W of one map that has no B, [T, n], of dy [T, m]."""
        return scaled_matmul(quantize_rows([dy]), self.by_input, dy.dtype)

    def below(self, Bs: list[Tensor], alpha: float) -> list[Work]:
        """Works that round alpha · B [H, m] below the weight, for each map.

        Not done when y is made: another adapter's B of this size may have been here since.
        """
        values, scale = self.by_input
        row, column, works = len(values) - len(Bs) * self.room, 0, []
        for B in Bs:
            H, m = B.shape
            out = Float8Rows(values[row : row + H, column : column + m], scale[row : row + H])
            works.append(partial(quantize_rows, [B], None, out, alpha))
            row, column = row + self.room, column + m
        return works


Kept = dict[tuple[int, ...], Float8Weights]  # by the ids of the maps, and the columns of room beside them


def frozen(
    linears: list[nn.Linear], kept: Kept, backward: bool, H: int = 0, instead: str = "the fused backend"
) -> Float8Weights | None:
    """Rounded weights of maps that read the same input, with room for their B [H, m]; None, and a log line, if there
    cannot be.

    They are made when a weight is new or has changed. `kept` is where they are looked up and put.
    """
    if reason := _obstacle(linears):
        warn_once("fp8", reason, instead)
        return None
    weights = [linear.weight.detach() for linear in linears]
    source = tuple((W.device, W.data_ptr(), W._version) for W in weights)
    room, n = room_for(H), weights[0].shape[1]
    place = (*map(id, linears), room)
    found = kept.get(place)
    with torch.inference_mode(False):  # they outlive it, and room is written to
        if found is None or found.source != source:
            found = Float8Weights(
                source, room, [zero_rows(W, len(W), n + (g + 1) * room) for g, W in enumerate(weights)], None
            )
            least = _min_row_magnitude(weights) if room else None
            for (values, scale), W in zip(found.by_output, weights, strict=True):
                quantize_rows([W], out=Float8Rows(values[:, :n], scale), min_magnitude=least)
        if backward and found.by_input is None:
            by_input = zero_rows(weights[0], n + len(weights) * room, sum(map(len, weights)))
            quantize_rows([W.T for W in weights], out=Float8Rows(by_input.values[:n], by_input.scale[:n]))
            found = found._replace(by_input=by_input)
    if not is_captured(weights[0]):
        kept[place] = found
    return found


def room_for(H: int) -> int:
    """C, the columns that B [H, m] takes beside a weight."""
    return -(-H // ALIGNMENT) * ALIGNMENT


def _min_row_magnitude(weights: list[Tensor]) -> Tensor:
    """What a row's largest magnitude counts for at least: [] float32. A row that is not finite loses itself alone."""
    largest = torch.cat([W.abs().amax(1) for W in weights]).float()
    return (MIN_ROW_SHARE * largest.nan_to_num(0.0, 0.0).max()).clamp(min=MIN_MAGNITUDE)


def _obstacle(linears: list[nn.Linear]) -> str | None:
    device = linears[0].weight.device
    for size in (linears[0].in_features, *(linear.out_features for linear in linears)):
        if size % ALIGNMENT:
            return f"a layer with a side of {size}, no multiple of {ALIGNMENT}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"on {torch.cuda.get_device_name(device)}, which has no 8-bit products"
    return None
