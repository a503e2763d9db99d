"""Quantize matrices to float8 with one scale per row, and multiply them.

    X ≈ scale ⊙ values        scale_i = max_j |X_ij| / 448        values = float8_e4m3fn(X / scale)

(Micikevicius et al. 2022, arXiv 2209.05433.) The frozen matmul and the up projection are one matmul of concatenated
operands, [x, h] and [W, B]:

    y = [x, h ⊙ u] [W, (B / u)ᵀ]ᵀ

A row of the right operand has a single scale, that of W's row. The up scale u_k brings row k of B into the range of
these scales; h is multiplied by it in turn.

1. `quantize_rows` quantizes [x, h ⊙ u]: one program per row reads the row once, keeps it in registers, finds its
   largest magnitude and stores the quantized values.
2. `quantize_up_proj` writes (B / u)ᵀ into the last C columns of the quantized W, and u.
3. `scaled_matmul` multiplies two quantized matrices.

| symbol | meaning | size |
| --- | --- | --- |
| G | projections of the group | |
| T, m | tokens, out features | |
| H | total rank of a projection's experts | |
| C | H, rounded up to ALIGNMENT: columns of h or B in a quantized matrix | |
| matrices | what is concatenated along columns and quantized as one matrix | [rows, columns] each |
| h | gated output of the experts | [G, T, H] |
| B | up projection | [H, m] |
| up_scale (u) | up scales of a projection; of a group [G, C] | [C] float32 |
| values | quantized matrix | [rows, columns] float8_e4m3fn |
| scale | scales of its rows | [rows, 1] float32 |

PyTorch has no call that quantizes by rows in a single pass: `amax`, division and cast read the matrix three times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from malora.fused.kernels.launch import launch
from malora.fused.tensor_utils import cdiv, next_power_of_2, round_up

E4M3_MAX = 448.0  # largest finite float8_e4m3fn
MIN_SCALE = torch.finfo(torch.float32).tiny  # scale of a row of zeros: its inverse is finite
ALIGNMENT = 16  # `torch._scaled_mm` wants both sides of a weight to be multiples of it
CACHE_LINE_BYTES = 128  # rows start at cache lines: matmuls took 1 to 4% less time in a probe on an H100


class Float8Rows(NamedTuple):
    """A matrix quantized by rows: row i is scale_i · values_i.

    Attributes:
        values: [rows, columns] float8_e4m3fn.
        scale: [rows, 1] float32.
    """

    values: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in `dtype`."""
        return self.values.to(dtype) * self.scale.to(dtype)


class UpOperand(NamedTuple):
    """The last columns of the left operand: h ⊙ up_scale of each projection.

    Attributes:
        h: [G, T, H].
        up_scale: [G, C] float32, with C ≥ H.
    """

    h: Tensor
    up_scale: Tensor


@triton.jit
def _quantize_rows_kernel(
    matrices, h_ptr, up_scale_ptr, min_magnitude_ptr, values_ptr, scale_ptr, h_stride, h_group_stride, values_stride,
    WIDTHS: tl.constexpr, ALPHA: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    UP_COLUMNS: tl.constexpr, BLOCK_UP: tl.constexpr, E4M3_MAX: tl.constexpr, MIN_SCALE: tl.constexpr,
):  # fmt: skip
    """Quantize one row: program (row).

    `matrices` is a tuple of pointers to contiguous matrices of WIDTHS columns each. UP_COLUMNS is G·C, the columns of h
    with their padding; 0 without h. `min_magnitude_ptr` may be None. BLOCK and BLOCK_UP are powers of two that cover a
    matrix's columns, and UP_COLUMNS.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = 0.0
    loaded = ()
    for i in tl.static_range(len(matrices)):
        x = tl.load(matrices[i] + row * WIDTHS[i] + columns, mask=columns < WIDTHS[i], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x)))
        # Triton does not know starred expressions; mypy takes `loaded` for an empty tuple.
        loaded = loaded + (x,)  # type: ignore[assignment]  # noqa: RUF005
    if UP_COLUMNS > 0:
        up_columns = tl.arange(0, BLOCK_UP)
        mask = (up_columns < UP_COLUMNS) & (up_columns % C < H)
        h_ptr += (up_columns // C).to(tl.int64) * h_group_stride + row * h_stride + up_columns % C
        h = tl.load(h_ptr, mask=mask, other=0.0).to(tl.float32)
        h *= tl.load(up_scale_ptr + up_columns, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(h)))
    if min_magnitude_ptr is not None:
        largest = tl.maximum(largest, tl.load(min_magnitude_ptr))
    scale = tl.maximum(tl.div_rn(largest, E4M3_MAX), MIN_SCALE)
    tl.store(scale_ptr + row, scale * ALPHA)
    inverse = tl.div_rn(1.0, scale)
    values_ptr += row * values_stride
    for i in tl.static_range(len(matrices)):
        tl.store(values_ptr + columns, (loaded[i] * inverse).to(tl.float8e4nv), mask=columns < WIDTHS[i])
        values_ptr += WIDTHS[i]
    if UP_COLUMNS > 0:
        tl.store(values_ptr + up_columns, (h * inverse).to(tl.float8e4nv), mask=up_columns < UP_COLUMNS)


def quantize_rows(
    matrices: list[Tensor],
    up: UpOperand | None = None,
    out: Float8Rows | None = None,
    alpha: float = 1.0,
    min_magnitude: Tensor | None = None,
) -> Float8Rows:
    """Quantize the concatenation [matrices, h ⊙ up_scale] with one scale per row.

    Args:
        matrices: [rows, columns] each, concatenated along columns.
        up: h and its up scales, for the last columns, or None.
        out: Where the result is written; None allocates it.
        alpha: Factor of the result, applied to the scales.
        min_magnitude: [] float32 or None. The scale of a row is that of its largest magnitude, or of this if larger.

    Returns:
        alpha · [matrices, h ⊙ up_scale], quantized.
    """
    if out is None:
        up_columns = 0 if up is None else up.up_scale.numel()
        out = _empty(matrices[0], len(matrices[0]), sum(matrix.shape[1] for matrix in matrices) + up_columns)
    (quantize_rows_triton if matrices[0].is_cuda else quantize_rows_torch)(matrices, up, out, alpha, min_magnitude)
    return out


def quantize_rows_triton(
    matrices: list[Tensor], up: UpOperand | None, out: Float8Rows, alpha: float, min_magnitude: Tensor | None
) -> None:
    """Quantize into `out` in one launch that reads each element once.

    Arguments as in `quantize_rows`.
    """
    matrices = [matrix.contiguous() for matrix in matrices]  # W may be a column slice of an augmented weight
    widths = tuple(matrix.shape[1] for matrix in matrices)
    block = next_power_of_2(max(widths))
    h, up_scale = up or (None, None)
    H, C, up_columns = (0, 1, 0) if up is None else (up.h.shape[2], up.up_scale.shape[1], up.up_scale.numel())
    strides = (0, 0) if up is None else (up.h.stride(1), up.h.stride(0))
    launch(
        _quantize_rows_kernel, (len(matrices[0]),),
        tuple(matrices), h, up_scale, min_magnitude, *out, *strides, out.values.stride(0), widths, alpha, block,
        H, C, up_columns, next_power_of_2(max(up_columns, 1)), E4M3_MAX, MIN_SCALE,
        num_warps=min(max(8, block // 2048), 32),
    )  # fmt: skip


def quantize_rows_torch(
    matrices: list[Tensor], up: UpOperand | None, out: Float8Rows, alpha: float, min_magnitude: Tensor | None
) -> None:
    """Quantize into `out` by PyTorch operations, for tensors on a CPU.

    Arguments as in `quantize_rows`.
    """
    if up is not None:
        H, C = up.h.shape[2], up.up_scale.shape[1]
        scaled_h = up.h.float() * up.up_scale[:, None, :H]
        matrices = [*matrices, *nn.functional.pad(scaled_h, (0, C - H))]
    joined = torch.cat([matrix.float() for matrix in matrices], 1)
    largest = joined.abs().amax(1, keepdim=True)
    if min_magnitude is not None:
        largest = largest.clamp(min=min_magnitude)
    scale = (largest / E4M3_MAX).clamp(min=MIN_SCALE)
    out.values.copy_((joined * (1 / scale)).to(out.values.dtype))
    torch.mul(scale, alpha, out=out.scale)


def _empty(like: Tensor, rows: int, columns: int) -> Float8Rows:
    """Return an uninitialized quantized matrix whose rows start at cache lines."""
    values = like.new_empty(rows, round_up(columns, CACHE_LINE_BYTES), dtype=torch.float8_e4m3fn)
    return Float8Rows(values[:, :columns], like.new_empty(rows, 1, dtype=torch.float32))


def zero_rows(like: Tensor, rows: int, columns: int) -> Float8Rows:
    """Return a quantized matrix [rows, columns] of zeros on the device of `like`.

    Its rows start at cache lines.
    """
    zeros = _empty(like, rows, columns)
    zeros.values.view(torch.uint8).zero_()  # torch cannot fill float8
    zeros.scale.zero_()
    return zeros


@triton.jit
def _quantize_up_proj_kernel(
    B_ptr, scale_ptr, out_ptr, up_scale_ptr, H, C, out_stride, m: tl.constexpr, ALPHA: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_MAX: tl.constexpr, E4M3_MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):  # fmt: skip
    """Quantize a tile of B: program (tile of ranks, tile of out features).

    `scale_ptr` is that of the scales of W's rows, `out_ptr` that of the last C columns of W's values. The largest
    magnitude of a rank needs all m out features. Each program finds it by itself, BLOCK_MAX at a time; sharing it would
    take a second launch.
    """
    ranks = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    largest = tl.zeros([BLOCK_H, BLOCK_MAX], tl.float32)
    for start in range(0, m, BLOCK_MAX):
        B = _load_B_over_scales(B_ptr, scale_ptr, m, H, start + tl.arange(0, BLOCK_MAX), ranks)
        largest = tl.maximum(largest, tl.abs(B))
    up_scale = tl.maximum(tl.div_rn(tl.max(largest, 1), E4M3_MAX), MIN_SCALE)
    if tl.program_id(1) == 0:
        tl.store(up_scale_ptr + ranks, up_scale * ALPHA, mask=ranks < C)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    B = _load_B_over_scales(B_ptr, scale_ptr, m, H, columns, ranks) * tl.div_rn(1.0, up_scale)[:, None]
    place = out_ptr + columns.to(tl.int64)[:, None] * out_stride + ranks[None, :]
    tl.store(place, tl.trans(B.to(tl.float8e4nv)), mask=(columns < m)[:, None] & (ranks < C)[None, :])


@triton.jit
def _load_B_over_scales(B_ptr, scale_ptr, m, H, columns, ranks):
    """Load a tile of B [ranks, columns], divided by the scales of W's rows."""
    inverse = tl.div_rn(1.0, tl.load(scale_ptr + columns, mask=columns < m, other=1.0))
    mask = (ranks < H)[:, None] & (columns < m)[None, :]
    B = tl.load(B_ptr + ranks[:, None] * m + columns[None, :], mask=mask, other=0.0)
    return B.to(tl.float32) * inverse[None, :]


def quantize_up_proj(W: Float8Rows, B: Tensor, alpha: float, up_scale: Tensor) -> None:
    """Write B, quantized, into the last C columns of W, and its up scales.

    B is quantized with the row scales of W.

    Args:
        W: Quantized frozen weight [m, n + padding]; its last C columns are written.
        B: [H, m], contiguous.
        alpha: Scaling of the up projection. It is applied to the up scales, so B does not contain it.
        up_scale: [C] float32 with C ≥ H, written: the factor of h.
    """
    if B.is_cuda:
        return quantize_up_proj_triton(W, B, alpha, up_scale)
    C = len(up_scale)
    relative = nn.functional.pad(B.T.float() * (1 / W.scale), (0, C - len(B)))
    largest = (relative.abs().amax(0) / E4M3_MAX).clamp(min=MIN_SCALE)
    W.values[:, -C:] = (relative * (1 / largest)).to(W.values.dtype)
    up_scale.copy_(largest * alpha)


def quantize_up_proj_triton(W: Float8Rows, B: Tensor, alpha: float, up_scale: Tensor) -> None:
    """Do the work of `quantize_up_proj` in one launch. Arguments as there."""
    (H, m), C = B.shape, len(up_scale)
    launch(
        _quantize_up_proj_kernel, (cdiv(C, 8), cdiv(m, 1024)),
        B, W.scale, W.values[:, -C:], up_scale, H, C, W.values.stride(0), m, alpha, 8, 1024, 2048, E4M3_MAX, MIN_SCALE,
        num_warps=16,
    )  # fmt: skip


def scaled_matmul(left: Float8Rows, right: Float8Rows, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Return left @ rightᵀ + bias of two quantized matrices.

    Args:
        left: [T, k].
        right: [m, k].
        dtype: Dtype of the result. A GPU rounds to bfloat16 first; a CPU accumulates in float32 or wider.
        bias: [m] or None.

    Returns:
        [T, m].
    """
    if left.values.is_cuda:
        bias = None if bias is None else bias.bfloat16()
        return torch._scaled_mm(
            left.values, right.values.T, left.scale, right.scale.T, bias, out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(dtype)
    acc_dtype = torch.promote_types(dtype, torch.float32)
    y = left.dequantize(acc_dtype) @ right.dequantize(acc_dtype).T
    return (y if bias is None else y + bias).to(dtype)
