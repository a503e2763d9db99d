"""Float8 copies of frozen weights, with columns for the up projection.

The up projection is quantized into these columns.

How it works:

1. Both factors of a GEMM are quantized to float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433), each row with
   one scale that brings its largest magnitude to 448.
2. Frozen weights do not change, so they are quantized once: by output for the forward pass, and transposed, by input,
   for the backward pass.
3. Forward, base and up projection are one GEMM, as in `augmented_weights.py`: y = [x h·u] [W (B/u)ᵀ]ᵀ. The factor u,
   one number per rank, brings B/u into the range of the weight's rows. Adding h B afterwards would read and write y
   twice more.
4. Backward, [dx dh] = dy [W Bᵀ] is one GEMM too. A GEMM for dh alone, which is needed where x wants no gradient, would
   read all of dy once more.

Down projections, routers, and the gradients of trained weights are not quantized.

Shapes: T tokens, n in, m out, Σm over the projections, G projections, H total rank of a projection's experts, C padded
columns for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
from malora.fused.tensor_utils import is_captured, round_up

# The magnitude that a weight's row counts for at least: as a share of the group's largest, and in absolute terms. The
# smaller it is, the larger is h·u next to x, which shares its scale.
MIN_ROW_SHARE, MIN_MAGNITUDE = 2.0**-8, 2.0**-64
Task = Callable[[], object]


class Float8Weights(NamedTuple):
    """The quantized weights of linear layers that read the same input.

    Attributes:
        source: device, address and version of each weight that was quantized.
        columns: C.
        by_output: of projection g, [W, zeros, columns for its B]: [m, n + (g + 1)·C].
        by_input: Wᵀ of all projections next to each other, and below it rows for each B in the columns of its
            projection: [n + G·C, Σm]. None until a gradient of the input is asked for.
    """

    source: tuple[tuple[torch.device, int, int], ...]
    columns: int
    by_output: list[Float8Rows]
    by_input: Float8Rows | None

    def new_up_scales(self, like: Tensor) -> Tensor:
        """Allocate the factors u of all projections, [G, C] float32."""
        return like.new_empty(len(self.by_output), self.columns, dtype=torch.float32)

    def load_up_proj(self, Bs: list[Tensor], alpha: float, up_scales: Tensor) -> list[Task]:
        """Return tasks that quantize alpha · B [H, m] next to each weight.

        They also set its factors u in `up_scales`.
        """
        operands = zip(self.by_output, Bs, up_scales, strict=True)
        return [partial(quantize_up_proj, W, B, alpha, up_scale) for W, B, up_scale in operands]

    def load_up_proj_backward(self, Bs: list[Tensor], alpha: float) -> list[Task]:
        """Return tasks that quantize alpha · B [H, m] below each transposed weight.

        The backward pass does this, not the forward pass: another adapter's B may have been there in between.
        """
        assert self.by_input is not None
        values, scale = self.by_input
        row, column = len(values) - len(Bs) * self.columns, 0
        tasks: list[Task] = []
        for B in Bs:
            H, m = B.shape
            out = Float8Rows(values[row : row + H, column : column + m], scale[row : row + H])
            tasks.append(partial(quantize_rows, [B], None, out, alpha))
            row, column = row + self.columns, column + m
        return tasks

    def outputs(self, x: Tensor, biases: list[Tensor | None], up: UpOperand | None = None) -> list[Tensor]:
        """Return x Wᵀ + h B + bias of each projection, [T, m], for x [T, n].

        One GEMM per projection: Liger's kernels copy outputs that are columns of a wider matrix.
        """
        values, scale = quantize_rows([x], up)
        return [
            scaled_matmul(Float8Rows(values[:, : W.values.shape[1]], scale), W, x.dtype, bias)
            for W, bias in zip(self.by_output, biases, strict=True)
        ]

    def gradients(self, dys: list[Tensor], Bs: list[Tensor], tasks: list[Task]) -> tuple[Tensor, Tensor]:
        """Return Σ dy W over the projections, [T, n], and dy Bᵀ of each, [G, T, H].

        Both are views of one GEMM's result.

        Args:
            dys: gradients of the outputs, each [T, m].
            Bs: the up projections, each [H, m].
            tasks: what must run before the GEMM, and may run while dy is quantized.
        """
        assert self.by_input is not None
        dy, *_ = run_on_parallel_streams(dys[0], [partial(quantize_rows, dys), *tasks])
        dx, dh = scaled_matmul(dy, self.by_input, dys[0].dtype).tensor_split([-len(Bs) * self.columns], 1)
        return dx, dh.unflatten(1, (len(Bs), self.columns)).transpose(0, 1)[..., : len(Bs[0])]

    def input_gradient(self, dy: Tensor) -> Tensor:
        """Return dy W of one linear layer without an up projection, [T, n], for dy [T, m]."""
        assert self.by_input is not None
        return scaled_matmul(quantize_rows([dy]), self.by_input, dy.dtype)


Float8Cache = dict[tuple[int, ...], Float8Weights]


def quantized_weights(
    linears: list[nn.Linear], cache: Float8Cache, *, backward: bool, H: int = 0, instead: str = "the fused backend"
) -> Float8Weights | None:
    """Return the float8 weights of linear layers that read the same input.

    They are quantized anew if a weight changed.

    Args:
        linears: the layers.
        cache: the copies that exist, by the ids of the layers and their padded columns.
        backward: whether gradients of the input will be asked for.
        H: total rank of the up projection that is to fit next to each weight.
        instead: name of the replacement if they cannot be quantized, for the log.

    Returns:
        The weights; None, and a line in the log, if the device or a size rules float8 out.
    """
    if reason := _obstacle(linears):
        warn_once("fp8", reason, instead)
        return None
    weights = [linear.weight.detach() for linear in linears]
    source = tuple((W.device, W.data_ptr(), W._version) for W in weights)
    columns, n = padded_rank(H), weights[0].shape[1]
    key = (*map(id, linears), columns)
    found = cache.get(key)
    with torch.inference_mode(False):  # they outlive inference mode, and their padded columns are written to
        if found is None or found.source != source:
            rows = [zero_rows(W, len(W), n + (g + 1) * columns) for g, W in enumerate(weights)]
            found = Float8Weights(source, columns, rows, None)
            least = _min_row_magnitude(weights) if columns else None
            for (values, scale), W in zip(found.by_output, weights, strict=True):
                quantize_rows([W], out=Float8Rows(values[:, :n], scale), min_magnitude=least)
        if backward and found.by_input is None:
            by_input = zero_rows(weights[0], n + len(weights) * columns, sum(map(len, weights)))
            quantize_rows([W.T for W in weights], out=Float8Rows(by_input.values[:n], by_input.scale[:n]))
            found = found._replace(by_input=by_input)
    if not is_captured(weights[0]):
        cache[key] = found
    return found


def padded_rank(H: int) -> int:
    """Return C, the columns of an up projection [H, m] next to a float8 weight."""
    return round_up(H, ALIGNMENT)


def _min_row_magnitude(weights: list[Tensor]) -> Tensor:
    """Return the magnitude that each row counts for at least, [] float32.

    A row that is not finite loses only itself.
    """
    largest = torch.cat([W.abs().amax(1) for W in weights]).float()
    return (MIN_ROW_SHARE * largest.nan_to_num(0.0, 0.0).max()).clamp(min=MIN_MAGNITUDE)


def _obstacle(linears: list[nn.Linear]) -> str | None:
    device = linears[0].weight.device
    for size in (linears[0].in_features, *(linear.out_features for linear in linears)):
        if size % ALIGNMENT:
            return f"a layer with {size} features, no multiple of {ALIGNMENT}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"on {torch.cuda.get_device_name(device)}, which has no float8 matmul"
    return None
