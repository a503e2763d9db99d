"""Quantize matrices to float8 by rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

E4M3_MAX = 448.0  # of float8_e4m3fn
MIN_SCALE = torch.finfo(torch.float32).tiny  # as a scale: a row of zeros has one too, and its inverse is finite
ALIGNMENT = 16  # of both sides of a weight and of the room beside it, by torch._scaled_mm
CACHE_LINE_BYTES = (
    128  # bytes of a cache's line: products of rows that begin with one take 1 to 4% less, in a probe on an H100
)


class Float8Rows(NamedTuple):
    """A matrix, rounded: row i is scale_i · values_i."""

    values: Tensor  # [rows, columns] float8_e4m3fn
    scale: Tensor  # [rows, 1] float32

    def wide(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype) * self.scale.to(dtype)


class UpOperand(NamedTuple):
    """What lies beside x: h of each sibling, and what it is multiplied by."""

    h: Tensor  # [G, T, H]
    unit: Tensor  # [G, C] float32


@triton.jit
def _quantize_rows_kernel(
    parts, h_ptr, unit_ptr, least_ptr, values_ptr, scale_ptr, h_stride, h_group, values_stride, WIDTHS: tl.constexpr,
    ALPHA: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, C: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_ROOM: tl.constexpr, E4M3_MAX: tl.constexpr, MIN_SCALE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = 0.0
    read = ()
    for part in tl.static_range(len(parts)):
        x = tl.load(parts[part] + row * WIDTHS[part] + columns, mask=columns < WIDTHS[part], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x)))
        read = read + (x,)  # noqa: RUF005 (Triton knows no starred expression)
    if ROOM > 0:
        places = tl.arange(0, BLOCK_ROOM)
        inside = (places < ROOM) & (places % C < H)
        h_ptr += (places // C).to(tl.int64) * h_group + row * h_stride + places % C
        h = tl.load(h_ptr, mask=inside, other=0.0).to(tl.float32) * tl.load(unit_ptr + places, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(h)))
    if least_ptr is not None:
        largest = tl.maximum(largest, tl.load(least_ptr))
    scale = tl.maximum(tl.div_rn(largest, E4M3_MAX), MIN_SCALE)
    tl.store(scale_ptr + row, scale * ALPHA)
    inverse = tl.div_rn(1.0, scale)
    values_ptr += row * values_stride
    for part in tl.static_range(len(parts)):
        tl.store(values_ptr + columns, (read[part] * inverse).to(tl.float8e4nv), mask=columns < WIDTHS[part])
        values_ptr += WIDTHS[part]
    if ROOM > 0:
        tl.store(values_ptr + places, (h * inverse).to(tl.float8e4nv), mask=places < ROOM)


def quantize_rows(
    parts: list[Tensor],
    up: UpOperand | None = None,
    out: Float8Rows | None = None,
    alpha: float = 1.0,
    least: Tensor | None = None,
) -> Float8Rows:
    """alpha times matrices [rows, columns] side by side, and h beside them, with one scale a row.

    It is of the row's largest magnitude, or of `least`, float32, if that is more. Written to `out`, if that is given.
    """
    if out is None:
        room = 0 if up is None else up.unit.numel()
        out = _empty(parts[0], len(parts[0]), sum(part.shape[1] for part in parts) + room)
    (quantize_rows_triton if parts[0].is_cuda else quantize_rows_torch)(parts, up, out, alpha, least)
    return out


def quantize_rows_triton(
    parts: list[Tensor], up: UpOperand | None, out: Float8Rows, alpha: float, least: Tensor | None
) -> None:
    """One launch that reads everything once: a row stays in registers."""
    parts = [part.contiguous() for part in parts]  # a weight's rows may have room beside them
    widths = tuple(part.shape[1] for part in parts)
    block = triton.next_power_of_2(max(widths))
    h, unit = up or (None, None)
    H, C, room = (0, 1, 0) if up is None else (h.shape[2], unit.shape[1], unit.numel())
    strides = (0, 0) if up is None else (h.stride(1), h.stride(0))
    _quantize_rows_kernel[(len(parts[0]),)](
        tuple(parts), h, unit, least, *out, *strides, out.values.stride(0), widths, alpha, block,
        H, C, room, triton.next_power_of_2(max(room, 1)), E4M3_MAX, MIN_SCALE,
        num_warps=min(max(8, block // 2048), 32),
    )  # fmt: skip


def quantize_rows_torch(
    parts: list[Tensor], up: UpOperand | None, out: Float8Rows, alpha: float, least: Tensor | None
) -> None:
    if up is not None:
        h = up.h.float() * up.unit[:, None, : up.h.shape[2]]
        parts = [*parts, *nn.functional.pad(h, (0, up.unit.shape[1] - h.shape[2]))]
    whole = torch.cat([part.float() for part in parts], 1)
    largest = whole.abs().amax(1, keepdim=True)
    scale = ((largest if least is None else largest.clamp(min=least)) / E4M3_MAX).clamp(min=MIN_SCALE)
    out.values.copy_((whole * (1 / scale)).to(out.values.dtype))
    torch.mul(scale, alpha, out=out.scale)


def _empty(like: Tensor, rows: int, columns: int) -> Float8Rows:
    values = like.new_empty(rows, -(-columns // CACHE_LINE_BYTES) * CACHE_LINE_BYTES, dtype=torch.float8_e4m3fn)
    return Float8Rows(values[:, :columns], like.new_empty(rows, 1, dtype=torch.float32))


def zero_rows(like: Tensor, rows: int, columns: int) -> Float8Rows:
    made = _empty(like, rows, columns)
    made.values.view(torch.uint8).zero_()  # torch fills no 8-bit floats
    made.scale.zero_()
    return made


@triton.jit
def _quantize_up_proj_kernel(
    B_ptr, scale_ptr, room_ptr, unit_ptr, H, C, room_stride, m: tl.constexpr, ALPHA: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, READ: tl.constexpr, E4M3_MAX: tl.constexpr, MIN_SCALE: tl.constexpr,
):  # fmt: skip
    ranks = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    largest = tl.zeros([BLOCK_H, READ], tl.float32)
    for start in range(0, m, READ):  # all of a rank, in each of its programs: to wait for others would be a launch more
        B = _over_row_scales(B_ptr, scale_ptr, m, H, start + tl.arange(0, READ), ranks)
        largest = tl.maximum(largest, tl.abs(B))
    unit = tl.maximum(tl.div_rn(tl.max(largest, 1), E4M3_MAX), MIN_SCALE)
    if tl.program_id(1) == 0:
        tl.store(unit_ptr + ranks, unit * ALPHA, mask=ranks < C)
    outputs = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    B = _over_row_scales(B_ptr, scale_ptr, m, H, outputs, ranks) * tl.div_rn(1.0, unit)[:, None]
    place = room_ptr + outputs.to(tl.int64)[:, None] * room_stride + ranks[None, :]
    tl.store(place, tl.trans(B.to(tl.float8e4nv)), mask=(outputs < m)[:, None] & (ranks < C)[None, :])


@triton.jit
def _over_row_scales(B_ptr, scale_ptr, m, H, outputs, ranks):
    """B over the scales of the weight's rows, [ranks, outputs]."""
    inverse = tl.div_rn(1.0, tl.load(scale_ptr + outputs, mask=outputs < m, other=1.0))
    inside = (ranks < H)[:, None] & (outputs < m)[None, :]
    B = tl.load(B_ptr + ranks[:, None] * m + outputs[None, :], mask=inside, other=0.0)
    return B.to(tl.float32) * inverse[None, :]


def quantize_up_proj_triton(W: Float8Rows, B: Tensor, alpha: float, unit: Tensor) -> None:
    """`put_beside`, in one launch."""
    (H, m), C = B.shape, len(unit)
    _quantize_up_proj_kernel[(triton.cdiv(C, 8), triton.cdiv(m, 1024))](
        B, W.scale, W.values[:, -C:], unit, H, C, W.values.stride(0), m, alpha, 8, 1024, 2048, E4M3_MAX, MIN_SCALE,
        num_warps=16,
    )  # fmt: skip


def quantize_up_proj(W: Float8Rows, B: Tensor, alpha: float, unit: Tensor) -> None:
    """Writes B [H, m] over `unit` into the last C columns of W, and alpha · `unit`, what h is multiplied by: [C]."""
    if B.is_cuda:
        return quantize_up_proj_triton(W, B, alpha, unit)
    C = len(unit)
    in_scales = nn.functional.pad(B.T.float() * (1 / W.scale), (0, C - len(B)))
    largest = (in_scales.abs().amax(0) / E4M3_MAX).clamp(min=MIN_SCALE)
    W.values[:, -C:] = (in_scales * (1 / largest)).to(W.values.dtype)
    unit.copy_(largest * alpha)


def scaled_matmul(left: Float8Rows, right: Float8Rows, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """left rightᵀ + bias, in `dtype`. On a GPU it is rounded to bfloat16 first; elsewhere sums are float32 or wider."""
    if left.values.is_cuda:
        bias = None if bias is None else bias.bfloat16()
        return torch._scaled_mm(
            left.values, right.values.T, left.scale, right.scale.T, bias, out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y = left.wide(wide) @ right.wide(wide).T
    return (y if bias is None else y + bias).to(dtype)
