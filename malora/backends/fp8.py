"""The frozen products of sibling layers in 8 bits: forward x Wᵀ, backward dy W to the input.

Both factors of a product are rounded to float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433), each row divided
by a scale of its own that brings its largest magnitude to 448. Weights do not change, so they are rounded once: by
output for the forward pass, and transposed, by input, for the backward pass. What is trained stays as in `fused`.

Shapes: T tokens, n in, m out, Σm over siblings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.siblings import say_once

if TYPE_CHECKING:
    from malora.layer import MaloraLayer

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = torch.finfo(torch.float32).tiny  # as a scale: a row of zeros has one too, and its inverse is finite
MULTIPLE = 16  # of both sides of a weight, by torch._scaled_mm


class Rows(NamedTuple):
    """A matrix, rounded: row i is scale_i · values_i."""

    values: Tensor  # [rows, columns] float8_e4m3fn
    scale: Tensor  # [rows, 1] float32

    def wide(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype) * self.scale.to(dtype)


@triton.jit
def _rounded_kernel(
    parts, values_ptr, scale_ptr, WIDTHS: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = 0.0
    read = ()
    for part in tl.static_range(len(parts)):
        x = tl.load(parts[part] + row * WIDTHS[part] + columns, mask=columns < WIDTHS[part], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x)))
        read = read + (x,)  # noqa: RUF005 (Triton knows no starred expression)
    scale = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    values_ptr += row * TOTAL
    for part in tl.static_range(len(parts)):
        tl.store(values_ptr + columns, (read[part] * inverse).to(tl.float8e4nv), mask=columns < WIDTHS[part])
        values_ptr += WIDTHS[part]


def rounded_by_kernel(parts: list[Tensor]) -> Rows:
    """`rounded`, in one launch that reads everything once: a row stays in registers."""
    widths = tuple(part.shape[1] for part in parts)
    values = parts[0].new_empty(len(parts[0]), sum(widths), dtype=torch.float8_e4m3fn)
    scale = parts[0].new_empty(len(parts[0]), 1, dtype=torch.float32)
    block = triton.next_power_of_2(max(widths))
    _rounded_kernel[(len(values),)](
        tuple(parts), values, scale, widths, sum(widths), block, LARGEST, SMALLEST,
        num_warps=min(max(block // 512, 4), 16),
    )  # fmt: skip
    return Rows(values, scale)


def rounded(parts: list[Tensor]) -> Rows:
    """Matrices [rows, columns] side by side, with one scale a row."""
    if parts[0].is_cuda:
        return rounded_by_kernel(parts)
    whole = torch.cat(parts, 1).float()
    scale = (whole.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST)
    return Rows((whole * (1 / scale)).to(torch.float8_e4m3fn), scale)


def product(left: Rows, right: Rows, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """left rightᵀ + bias, in `dtype`. On a GPU it is rounded to bfloat16 first; elsewhere sums are float32 or wider."""
    if left.values.is_cuda:
        bias = None if bias is None else bias.bfloat16()
        return torch._scaled_mm(
            left.values, right.values.T, left.scale, right.scale.T, bias, out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y = left.wide(wide) @ right.wide(wide).T
    return (y if bias is None else y + bias).to(dtype)


class Frozen(NamedTuple):
    """The weights of some siblings, rounded."""

    source: tuple  # where they were read, and in which version
    by_output: list[Rows]  # W of each, [m, n]
    by_input: Rows | None  # Wᵀ of all side by side, [n, Σm]; None until a gradient of the input is asked for

    def outputs(self, x: Tensor, layers: list[MaloraLayer]) -> list[Tensor]:
        """x Wᵀ and the bias of each layer, for x [T, n]: [T, m].

        Not as columns of one product: Liger's kernels copy what is not contiguous.
        """
        x_rows = rounded([x])
        return [
            product(x_rows, W, x.dtype, layer.base_layer.bias) for W, layer in zip(self.by_output, layers, strict=True)
        ]

    def input_gradient(self, dys: list[Tensor]) -> Tensor:
        """Σ dy W over the layers, of contiguous dy [T, m]: [T, n], one product of Σm terms."""
        return product(rounded(dys), self.by_input, dys[0].dtype)


def frozen(layers: list[MaloraLayer], backward: bool) -> Frozen | None:
    """The layers' rounded weights, made when a weight is new or has changed; None, and a log line, if they cannot be.

    Siblings keep them, so they live as long as the layers do, whatever the mode.
    """
    if reason := _obstacle(layers):
        say_once("fp8", reason, "fused")
        return None
    weights = [layer.base_layer.weight.detach() for layer in layers]
    source = tuple((W.device, W.data_ptr(), W._version) for W in weights)
    kept, place = layers[0].siblings.frozen, tuple(map(id, layers))
    found = kept.get(place)
    if found is None or found.source != source:
        found = Frozen(source, [rounded([W.contiguous()]) for W in weights], None)
    if backward and found.by_input is None:
        found = found._replace(by_input=rounded([W.T.contiguous() for W in weights]))
    # What a CUDA graph makes while it is captured has no values until the graph is replayed.
    if not (weights[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        kept[place] = found
    return found


def _obstacle(layers: list[MaloraLayer]) -> str | None:
    device = layers[0].base_layer.weight.device
    for size in (layers[0].in_features, *(layer.out_features for layer in layers)):
        if size % MULTIPLE:
            return f"a layer with a side of {size}, no multiple of {MULTIPLE}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"on {torch.cuda.get_device_name(device)}, which has no 8-bit products"
    return None
