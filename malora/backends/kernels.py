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

BLOCK_T = 32


@triton.jit
def _probabilities(l_ptr, rows, row_inside, l_stride, experts, N: tl.constexpr, WIDE: tl.constexpr):
    inside = row_inside[:, None] & (experts < N)[None, :]
    logits = tl.load(l_ptr + rows[:, None] * l_stride + experts[None, :], mask=inside, other=float("-inf")).to(WIDE)
    logits = tl.where((experts < N)[None, :], tl.where(row_inside[:, None], logits, 0.0), float("-inf"))
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
def _gate_kernel(
    z_ptr, l_ptr, p_ptr, h_ptr, probability_ptr, T, z_stride, l_stride, h_stride, p_group, p_row,
    SCALING: tl.constexpr, Z_GROUP: tl.constexpr, L_GROUP: tl.constexpr, Z_STEP: tl.constexpr, HAS_P: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    PAD_N: tl.constexpr, PAD_R: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_inside = rows < T
    experts = tl.arange(0, PAD_N)
    probability = _probabilities(l_ptr + group * L_GROUP, rows, row_inside, l_stride, experts, N, WIDE)
    tl.store(
        probability_ptr + (group * T + rows[:, None]) * N + experts[None, :], probability,
        mask=row_inside[:, None] & (experts < N)[None, :],
    )  # fmt: skip
    gate = probability * _largest(probability, experts, N, K, PAD_N) * SCALING
    ranks = tl.arange(0, PAD_R)
    columns = tl.arange(0, PAD_D)
    z_ptr += group * Z_GROUP
    if HAS_P and Z_STEP == 0:
        z = tl.load(z_ptr + rows[:, None] * z_stride + columns[None, :],
                    mask=row_inside[:, None] & (columns < D)[None, :], other=0.0)  # fmt: skip
    for t in range(N):
        gate_t = tl.sum(tl.where((experts == t)[None, :], gate, 0.0), 1)
        if HAS_P:
            if Z_STEP != 0:
                z = tl.load(z_ptr + rows[:, None] * z_stride + t * Z_STEP + columns[None, :],
                            mask=row_inside[:, None] & (columns < D)[None, :], other=0.0)  # fmt: skip
            p_t = tl.load(p_ptr + group * p_group + (t * R + ranks[None, :]) * p_row + columns[:, None],
                          mask=(ranks < R)[None, :] & (columns < D)[:, None], other=0.0)  # fmt: skip
            u = tl.dot(z, p_t, input_precision="ieee", out_dtype=WIDE)
        else:
            u = tl.load(z_ptr + rows[:, None] * z_stride + t * Z_STEP + ranks[None, :],
                        mask=row_inside[:, None] & (ranks < R)[None, :], other=0.0).to(WIDE)  # fmt: skip
        tl.store(h_ptr + (group * T + rows[:, None]) * h_stride + t * R + ranks[None, :], u * gate_t[:, None],
                 mask=row_inside[:, None] & (ranks < R)[None, :])  # fmt: skip


@triton.jit
def _gate_backward_kernel(
    z_ptr, l_ptr, p_ptr, dh_ptr, dprobability_ptr, dz_ptr, dl_ptr, e_ptr,
    T, z_stride, l_stride, h_stride, p_group, p_row,
    SCALING: tl.constexpr, Z_GROUP: tl.constexpr, L_GROUP: tl.constexpr, Z_STEP: tl.constexpr, HAS_P: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    PAD_N: tl.constexpr, PAD_R: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_inside = rows < T
    experts = tl.arange(0, PAD_N)
    probability = _probabilities(l_ptr + group * L_GROUP, rows, row_inside, l_stride, experts, N, WIDE)
    chosen = _largest(probability, experts, N, K, PAD_N)
    gate = probability * chosen * SCALING
    dgate = tl.zeros_like(probability)
    ranks = tl.arange(0, PAD_R)
    columns = tl.arange(0, PAD_D)
    h_inside = row_inside[:, None] & (ranks < R)[None, :]
    z_inside = row_inside[:, None] & (columns < D)[None, :]
    z_ptr += group * Z_GROUP
    dz_ptr += group * Z_GROUP
    if HAS_P and Z_STEP == 0:
        z = tl.load(z_ptr + rows[:, None] * z_stride + columns[None, :], mask=z_inside, other=0.0)
        dz = tl.zeros([BLOCK_T, PAD_D], dtype=WIDE)
    for t in range(N):
        is_t = (experts == t)[None, :]
        gate_t = tl.sum(tl.where(is_t, gate, 0.0), 1)
        h_place = (group * T + rows[:, None]) * h_stride + t * R + ranks[None, :]
        dh = tl.load(dh_ptr + h_place, mask=h_inside, other=0.0).to(WIDE)
        if HAS_P:
            if Z_STEP != 0:
                z = tl.load(z_ptr + rows[:, None] * z_stride + t * Z_STEP + columns[None, :], mask=z_inside, other=0.0)
            p_t = tl.load(p_ptr + group * p_group + (t * R + ranks[None, :]) * p_row + columns[:, None],
                          mask=(ranks < R)[None, :] & (columns < D)[:, None], other=0.0)  # fmt: skip
            u = tl.dot(z, p_t, input_precision="ieee", out_dtype=WIDE)
        else:
            u = tl.load(z_ptr + rows[:, None] * z_stride + t * Z_STEP + ranks[None, :], mask=h_inside, other=0.0)
            u = u.to(WIDE)
        dgate += tl.where(is_t, (tl.sum(dh * u, 1) * SCALING)[:, None], 0.0)
        e = dh * gate_t[:, None]
        if HAS_P:
            narrow = e.to(z_ptr.dtype.element_ty)
            tl.store(e_ptr + h_place, narrow, mask=h_inside)
            dz_t = tl.dot(narrow, tl.trans(p_t), input_precision="ieee", out_dtype=WIDE)
            if Z_STEP == 0:
                dz += dz_t
            else:
                tl.store(dz_ptr + rows[:, None] * z_stride + t * Z_STEP + columns[None, :], dz_t, mask=z_inside)
        else:
            tl.store(dz_ptr + rows[:, None] * z_stride + t * Z_STEP + ranks[None, :], e, mask=h_inside)
    if HAS_P and Z_STEP == 0:
        tl.store(dz_ptr + rows[:, None] * z_stride + columns[None, :], dz, mask=z_inside)
    inside = row_inside[:, None] & (experts < N)[None, :]
    place = (group * T + rows[:, None]) * N + experts[None, :]
    dp = dgate * chosen + tl.load(dprobability_ptr + place, mask=inside, other=0.0)
    dl = probability * (dp - tl.sum(probability * dp, 1)[:, None])
    tl.store(dl_ptr + group * L_GROUP + rows[:, None] * l_stride + experts[None, :], dl, mask=inside)


@dataclass(frozen=True)
class GateShape:
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

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "SCALING": self.scaling, "Z_GROUP": self.z_group, "L_GROUP": self.l_group, "Z_STEP": self.z_step,
            "HAS_P": self.has_p, "N": self.N, "K": self.top_k, "R": self.r, "D": self.D,
            "PAD_N": triton.next_power_of_2(self.N), "PAD_R": _pad(self.r), "PAD_D": _pad(self.D),
            "WIDE": tl.float64 if dtype == torch.float64 else tl.float32, "BLOCK_T": BLOCK_T,
        }  # fmt: skip


def _pad(size: int) -> int:
    return max(16, triton.next_power_of_2(size))  # tl.dot takes no less


def gate(zl: Tensor, P: Tensor | None, h: Tensor, shape: GateShape) -> Tensor:
    """Route and gate: writes h [G, T, ≥H]; returns the probabilities [G, T, N], float32 or wider.

    Args:
        zl: [T, ...] what the down sides gave, and behind it the routers' logits; `shape` says where.
        P: [G, N, r, ≥D] or None.
    """
    G, T = h.shape[:2]
    probability = zl.new_empty(G, T, shape.N, dtype=torch.promote_types(zl.dtype, torch.float32))
    logits = zl[:, shape.logits_at :]
    _gate_kernel[(triton.cdiv(T, BLOCK_T), G)](
        zl, logits, P, h, probability, T, zl.stride(0), zl.stride(0), h.stride(1), *_strides(P),
        **shape.constants(zl.dtype),
    )  # fmt: skip
    return probability


def gate_backward(
    zl: Tensor, P: Tensor | None, dh: Tensor, dprobability: Tensor, dzl: Tensor, shape: GateShape
) -> Tensor | None:
    """Writes the gradients of zl into dzl; returns e [G, T, ≥H], of which dP is eᵀ z, or None without P."""
    G, T = dh.shape[:2]
    e = torch.empty_like(dh) if P is not None else None
    _gate_backward_kernel[(triton.cdiv(T, BLOCK_T), G)](
        zl, zl[:, shape.logits_at :], P, dh, dprobability, dzl, dzl[:, shape.logits_at :], e,
        T, zl.stride(0), zl.stride(0), dh.stride(1), *_strides(P),
        **shape.constants(zl.dtype),
    )  # fmt: skip
    return e


def _strides(P: Tensor | None) -> tuple[int, int]:
    return (0, 0) if P is None else (P.stride(0), P.stride(2))
