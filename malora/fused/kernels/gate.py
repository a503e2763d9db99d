"""Triton kernels of the fused backend: what stands between its matrix products.

Shapes: T tokens, G siblings, N experts, r rank, H = N·r. A program handles a block of tokens of one sibling. Sums are
in float32, or float64 where the data is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels.tiling import accumulator_dtype, tile_size

BLOCK_T = 32
COLUMNS = 64  # of h at once, of as many whole experts: the fastest tried on an H100


@triton.jit
def _loaded(whole_ptr, parts_ptr, place, inside, part_stride, PARTS: tl.constexpr):
    """What is at whole_ptr; or the sum of so many parts, rounded as what is there is, and left there."""
    if PARTS == 0:
        whole = tl.load(whole_ptr + place, mask=inside, other=0.0)
    else:
        total = tl.load(parts_ptr + place, mask=inside, other=0.0)
        for _ in tl.static_range(1, PARTS):
            parts_ptr += part_stride
            total += tl.load(parts_ptr + place, mask=inside, other=0.0)
        whole = total.to(whole_ptr.dtype.element_ty)
        tl.store(whole_ptr + place, whole, mask=inside)
    return whole


@triton.jit
def _probabilities(logits, experts, N: tl.constexpr, WIDE: tl.constexpr):
    """Rows of logits that are not there must be zero, not infinite."""
    logits = tl.where((experts < N)[None, :], logits.to(WIDE), float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _largest(probability, experts, N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr):
    """1 for the K largest of a row, of equals the first."""
    remaining = tl.where((experts < N)[None, :], probability, -2.0)
    chosen = tl.zeros_like(probability)
    for _ in range(K):
        is_most = remaining == tl.max(remaining, 1)[:, None]
        first = tl.min(tl.where(is_most, experts[None, :], PAD_N), 1)
        best = experts[None, :] == first[:, None]
        chosen = tl.where(best, 1.0, chosen)
        remaining = tl.where(best, -1.0, remaining)
    return chosen


@triton.jit
def _gates_of(gate, experts, columns, first, R: tl.constexpr, EACH: tl.constexpr):
    """[BLOCK_T, columns]: of each column its expert's gate; the columns are those of EACH experts from `first` on."""
    of_columns = tl.zeros([gate.shape[0], columns.shape[0]], dtype=gate.dtype)
    for j in range(EACH):
        gate_t = tl.sum(tl.where((experts == first + j)[None, :], gate, 0.0), 1)
        of_columns = tl.where((columns // R == j)[None, :], gate_t[:, None], of_columns)
    return of_columns


@triton.jit
def _P_of(
    p_ptr, columns, subspace, first, p_row, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr, Z_STEP: tl.constexpr
):
    """[columns, subspace] of P: rows of experts from `first` on, beside what they read of z, and zeros elsewhere."""
    inside = (first * R + columns < N * R)[:, None]
    if Z_STEP == 0:
        inside &= (subspace < D)[None, :]
    else:
        inside &= (columns // R)[:, None] == (subspace // D)[None, :]
    return tl.load(p_ptr + (first * R + columns)[:, None] * p_row + (subspace % D)[None, :], mask=inside, other=0.0)


@triton.jit
def _gate_kernel(
    zl_ptr, parts_ptr, p_ptr, h_ptr, probability_ptr, T, zl_stride, part_stride, h_stride, h_group, p_group, p_row,
    PARTS: tl.constexpr, SCALING: tl.constexpr, Z_GROUP: tl.constexpr, L_GROUP: tl.constexpr, LOGITS_AT: tl.constexpr,
    Z_STEP: tl.constexpr, HAS_P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    EACH: tl.constexpr, PAD_N: tl.constexpr, PAD_H: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_inside = (rows < T)[:, None]
    experts = tl.arange(0, PAD_N)
    columns = tl.arange(0, PAD_H)
    subspace = tl.arange(0, PAD_D)
    l_inside = row_inside & (experts < N)[None, :]
    # Of a row of zl, a program reads, and writes where it comes in parts, its sibling's columns alone.
    z_place = rows[:, None] * zl_stride + group * Z_GROUP
    l_place = rows[:, None] * zl_stride + LOGITS_AT + group * L_GROUP + experts[None, :]
    logits = _loaded(zl_ptr, parts_ptr, l_place, l_inside, part_stride, PARTS)
    probability = _probabilities(logits, experts, N, WIDE)
    tl.store(probability_ptr + (group * T + rows[:, None]) * N + experts[None, :], probability, mask=l_inside)
    gate = probability * _largest(probability, experts, N, K, PAD_N) * SCALING
    if HAS_P and Z_STEP == 0:
        z_inside = row_inside & (subspace < D)[None, :]
        z = _loaded(zl_ptr, parts_ptr, z_place + subspace[None, :], z_inside, part_stride, PARTS)
    for first in range(0, N, EACH):
        h_inside = row_inside & (columns < min(EACH * R, N * R - first * R))[None, :]
        if HAS_P:
            if Z_STEP != 0:
                z_inside = row_inside & (subspace < min(EACH * D, N * D - first * D))[None, :]
                z_at = z_place + first * D + subspace[None, :]
                z = _loaded(zl_ptr, parts_ptr, z_at, z_inside, part_stride, PARTS)
            p = _P_of(p_ptr + group * p_group, columns, subspace, first, p_row, N, R, D, Z_STEP)
            u = tl.dot(z, tl.trans(p), input_precision="ieee", out_dtype=WIDE)
        else:
            u_at = z_place + first * R + columns[None, :]
            u = _loaded(zl_ptr, parts_ptr, u_at, h_inside, part_stride, PARTS).to(WIDE)
        h_place = group * h_group + rows[:, None] * h_stride + first * R + columns[None, :]
        tl.store(h_ptr + h_place, u * _gates_of(gate, experts, columns, first, R, EACH), mask=h_inside)


@triton.jit
def _gate_backward_kernel(
    zl_ptr, p_ptr, dh_ptr, dprobability_ptr, dzl_ptr, e_ptr, T, zl_stride, dzl_stride, e_stride, h_stride, h_group,
    p_group, p_row, HAS_DPROBABILITY: tl.constexpr, SCALING: tl.constexpr, Z_GROUP: tl.constexpr, L_GROUP: tl.constexpr,
    LOGITS_AT: tl.constexpr, Z_STEP: tl.constexpr, HAS_P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, PAD_N: tl.constexpr, PAD_H: tl.constexpr,
    PAD_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_inside = (rows < T)[:, None]
    experts = tl.arange(0, PAD_N)
    columns = tl.arange(0, PAD_H)
    subspace = tl.arange(0, PAD_D)
    l_inside = row_inside & (experts < N)[None, :]
    z_ptr = zl_ptr + rows[:, None] * zl_stride + group * Z_GROUP
    dz_ptr = dzl_ptr + rows[:, None] * dzl_stride + group * Z_GROUP
    l_column = LOGITS_AT + group * L_GROUP + experts[None, :]
    logits = tl.load(zl_ptr + rows[:, None] * zl_stride + l_column, mask=l_inside, other=0.0)
    probability = _probabilities(logits, experts, N, WIDE)
    chosen = _largest(probability, experts, N, K, PAD_N)
    gate = probability * chosen * SCALING
    dgate = tl.zeros_like(probability)
    if HAS_P and Z_STEP == 0:
        z = tl.load(z_ptr + subspace[None, :], mask=row_inside & (subspace < D)[None, :], other=0.0)
        dz = tl.zeros([BLOCK_T, PAD_D], dtype=WIDE)
    for first in range(0, N, EACH):
        h_inside = row_inside & (columns < min(EACH * R, N * R - first * R))[None, :]
        h_place = group * h_group + rows[:, None] * h_stride + first * R + columns[None, :]
        dh = tl.load(dh_ptr + h_place, mask=h_inside, other=0.0).to(WIDE)
        if HAS_P:
            if Z_STEP != 0:
                z_inside = row_inside & (subspace < min(EACH * D, N * D - first * D))[None, :]
                z = tl.load(z_ptr + first * D + subspace[None, :], mask=z_inside, other=0.0)
            p = _P_of(p_ptr + group * p_group, columns, subspace, first, p_row, N, R, D, Z_STEP)
            u = tl.dot(z, tl.trans(p), input_precision="ieee", out_dtype=WIDE)
        else:
            u = tl.load(z_ptr + first * R + columns[None, :], mask=h_inside, other=0.0).to(WIDE)
        of_gates = dh * u * SCALING
        for j in range(EACH):
            dgate_t = tl.sum(tl.where((columns // R == j)[None, :], of_gates, 0.0), 1)
            dgate += tl.where((experts == first + j)[None, :], dgate_t[:, None], 0.0)
        e = dh * _gates_of(gate, experts, columns, first, R, EACH)
        if HAS_P:
            narrow = e.to(zl_ptr.dtype.element_ty)
            e_place = (group * T + rows[:, None]) * e_stride + first * R + columns[None, :]
            tl.store(e_ptr + e_place, narrow, mask=h_inside)
            dz_of = tl.dot(narrow, p, input_precision="ieee", out_dtype=WIDE)
            if Z_STEP == 0:
                dz += dz_of
            else:
                tl.store(dz_ptr + first * D + subspace[None, :], dz_of, mask=z_inside)
        else:
            tl.store(dz_ptr + first * R + columns[None, :], e, mask=h_inside)
    if HAS_P and Z_STEP == 0:  # what pads it too, with zeros
        tl.store(dz_ptr + subspace[None, :], dz, mask=row_inside & (subspace < Z_GROUP)[None, :])
    dp = dgate * chosen
    if HAS_DPROBABILITY:
        dp += tl.load(dprobability_ptr + (group * T + rows[:, None]) * N + experts[None, :], mask=l_inside, other=0.0)
    dl = probability * (dp - tl.sum(probability * dp, 1)[:, None])
    tl.store(dzl_ptr + rows[:, None] * dzl_stride + l_column, dl, mask=l_inside)


@dataclass(frozen=True)
class GateLayout:
    """Sizes of siblings that are gated together, and where things stand in a row of `zl`.

    Attributes:
        N, top_k, r: experts, experts that serve a token, rank of an expert.
        D: columns of P: d, or d/N with a subspace an expert; r without P.
        z_step: columns from an expert's part of z to the next one's; 0 where all read the same.
        z_group, l_group: columns from a sibling's z, or logits, to the next one's.
        logits_at: the column where the logits begin.
    """

    N: int
    top_k: int
    r: int
    D: int
    z_step: int
    z_group: int
    l_group: int
    logits_at: int
    has_p: bool
    scaling: float

    def constants(self, dtype: torch.dtype, columns: int = COLUMNS) -> dict[str, Any]:
        """What the kernels are compiled for; they take as many experts at a time as have `columns` ranks at most."""
        times = triton.cdiv(self.N, max(1, columns // self.r))
        each = triton.cdiv(self.N, times)  # of eight experts four and four, not five and three
        return {
            "SCALING": self.scaling, "Z_GROUP": self.z_group, "L_GROUP": self.l_group,
            "LOGITS_AT": self.logits_at, "Z_STEP": self.z_step, "HAS_P": self.has_p,
            "N": self.N, "K": self.top_k, "R": self.r, "D": self.D,
            "EACH": each, "PAD_N": triton.next_power_of_2(self.N), "PAD_H": tile_size(each * self.r),
            "PAD_D": tile_size(each * self.D if self.z_step else self.D),
            "WIDE": accumulator_dtype(dtype), "BLOCK_T": BLOCK_T,
        }  # fmt: skip


def stages(shape: GateLayout, parts: int) -> int:
    """Stages of the forward kernel's loads. Ahead of a loop over experts' own z they would all be parts of z, many."""
    return 1 if parts and shape.z_step else 3


def gate(zl: Tensor, P: Tensor | None, h: Tensor, shape: GateLayout, parts: Tensor | None = None) -> Tensor:
    """Route and gate: writes h [G, T, ≥H], in rows anywhere; returns the probabilities [G, T, N], float32 or wider.

    Args:
        zl: [T, ...] what the down sides gave, and behind it the routers' logits; `shape` says where.
        P: [G, N, r, ≥D] or None.
        parts: [parts, T, ...] in float32 or wider, in rows as far apart as zl's. If given, their sum is written into
            zl; padding stays as it is.
    """
    G, T = h.shape[:2]
    probability = zl.new_empty(G, T, shape.N, dtype=torch.promote_types(zl.dtype, torch.float32))
    assert parts is None or parts.stride(1) == zl.stride(0)
    count, part_stride = (0, 0) if parts is None else (len(parts), parts.stride(0))
    _gate_kernel[(triton.cdiv(T, BLOCK_T), G)](
        zl, parts, P, h, probability, T, zl.stride(0), part_stride, h.stride(1), h.stride(0), *_strides(P), PARTS=count,
        num_stages=stages(shape, count), **shape.constants(zl.dtype),
    )  # fmt: skip
    return probability


def gate_backward(
    zl: Tensor, P: Tensor | None, dh: Tensor, dprobability: Tensor | None, dzl: Tensor, shape: GateLayout
) -> Tensor | None:
    """Writes the gradients of zl into dzl [T, ...]; returns e [G, T, ≥H], of which dP is eᵀ z, or None without P.

    Args:
        zl, P: as `gate` left and took them; rows of zl may be as far apart as they like.
        dh: [G, T, ≥H], in rows anywhere.
        dprobability: [G, T, N], contiguous; None is zero.
    """
    G, T = dh.shape[:2]
    e = dh.new_empty(dh.shape) if P is not None else None
    _gate_backward_kernel[(triton.cdiv(T, BLOCK_T), G)](
        zl, P, dh, dprobability, dzl, e, T, zl.stride(0), dzl.stride(0), dh.shape[2], dh.stride(1), dh.stride(0),
        *_strides(P), HAS_DPROBABILITY=dprobability is not None,
        **shape.constants(zl.dtype, shape.r if shape.has_p else COLUMNS),  # with P, registers for one expert
    )  # fmt: skip
    return e


def _strides(P: Tensor | None) -> tuple[int, int]:
    return (0, 0) if P is None else (P.stride(0), P.stride(2))
