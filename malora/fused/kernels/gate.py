"""Top-k routing and gating of the experts' down projections, forward and backward.

Forward, for each token and projection:

    probability = softmax(logits)
    chosen_t    = [t is among the k most probable experts]
    gate_t      = scaling · probability_t · chosen_t, over Σ probability ⊙ chosen if renormalised
    h_t         = gate_t · P_t z

Backward, from dh and dprobability:

    gated_dh_t   = gate_t · dh_t
    dz           = Σ_t P_tᵀ gated_dh_t
    dgate_t      = scaling · dh_tᵀ (P_t z)
    dprobability += dgate ⊙ chosen, or if renormalised
                    (dgate - Σ gate ⊙ dgate / scaling) ⊙ chosen / Σ probability ⊙ chosen
    dlogits      = probability ⊙ (dprobability - Σ probability ⊙ dprobability)

(dP = gated_dhᵀ z is computed by `down_backward.py`.) Three layouts of z share the kernels: all experts read one z
(MALoRA, a shared subspace), each expert reads columns of its own (an unshared subspace), or there is no P and each
expert's z is its down projection (MoLoRA).

1. A program handles a tile of tokens of one projection. It computes the gates of all experts in registers.
2. It loops over steps of a few experts. In each step it computes P_t z for these experts as one `tl.dot` and multiplies
   each column by its expert's gate.
3. The forward kernel can read z and the logits as split-K splits (`down_forward.dropout_matmul_split_k`). It adds them
   in order, rounds the sum to the dtype of down_out and stores it there for the backward pass.

| symbol | meaning | size |
| --- | --- | --- |
| T | tokens | |
| G | projections of the group | |
| N, K | experts, experts chosen per token | |
| R, H | rank of an expert, of all experts of a projection | H = N·R |
| D | columns of P: size of the z that one expert reads; R without P | |
| E_STEP | experts per step of the loop | |
| down_out | z of all projections, then their logits; see `GateLayout` | [T, columns] |
| P | maps z to an expert's rank space | [G, N, R, ≥D] |
| h | gated output of the experts | [G, T, ≥H] |
| probability | router probabilities | [G, T, N] float32 |
| expert_out | P_t z, or z without P | tile [tokens, E_STEP·R] |
| PAD_N, PAD_H, PAD_D | tile sides that cover N, E_STEP·R, and the z of a step | |

Accumulators are float32, or float64 for float64 data. As PyTorch operations this is some ten launches that each read
and write small tensors; here it is one launch for all projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.fused.kernels.launch import launch
from malora.fused.kernels.tiling import accumulator_dtype, tile_size
from malora.fused.tensor_utils import cdiv, next_power_of_2

BLOCK_T = 32  # tokens per program
MAX_STEP_COLUMNS = 64  # columns of h per step of the loop: the fastest tried on an H100


@triton.jit
def _load_or_sum(out_ptr, splits_ptr, offsets, mask, split_stride, SPLITS: tl.constexpr):
    """Load from out_ptr, or store and return the sum of the splits.

    If there are SPLITS, their sum is stored in out_ptr and returned as it was rounded.
    """
    if SPLITS == 0:
        value = tl.load(out_ptr + offsets, mask=mask, other=0.0)
    else:
        total = tl.load(splits_ptr + offsets, mask=mask, other=0.0)
        for _ in tl.static_range(1, SPLITS):
            splits_ptr += split_stride
            total += tl.load(splits_ptr + offsets, mask=mask, other=0.0)
        value = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, value, mask=mask)
    return value


@triton.jit
def _softmax(logits, experts, N: tl.constexpr, ACC: tl.constexpr):
    """Return the softmax over the N experts.

    Logits of masked tokens must be finite, so that no NaN arises.
    """
    logits = tl.where((experts < N)[None, :], logits.to(ACC), float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _top_k_mask(probability, experts, N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr):
    """Return 1.0 for the K most probable experts of each token, else 0.0.

    Ties go to the lower index.
    """
    remaining = tl.where((experts < N)[None, :], probability, -2.0)
    chosen = tl.zeros_like(probability)
    for _ in range(K):
        is_max = remaining == tl.max(remaining, 1)[:, None]
        index = tl.min(tl.where(is_max, experts[None, :], PAD_N), 1)
        best = experts[None, :] == index[:, None]
        chosen = tl.where(best, 1.0, chosen)
        remaining = tl.where(best, -1.0, remaining)
    return chosen


@triton.jit
def _gates(probability, chosen, RENORMALIZE: tl.constexpr):
    """Return the gates without the scaling. Their sum over the experts is 1 if they are renormalised."""
    gates = probability * chosen
    if RENORMALIZE:
        gates = gates / tl.sum(gates, 1)[:, None]
    return gates


@triton.jit
def _gate_of_columns(gate, experts, columns, first, R: tl.constexpr, E_STEP: tl.constexpr):
    """Return each column's gate, [BLOCK_T, PAD_H].

    There are R columns for each of the E_STEP experts from `first` on.
    """
    of_columns = tl.zeros([gate.shape[0], columns.shape[0]], dtype=gate.dtype)
    for j in range(E_STEP):
        gate_t = tl.sum(tl.where((experts == first + j)[None, :], gate, 0.0), 1)
        of_columns = tl.where((columns // R == j)[None, :], gate_t[:, None], of_columns)
    return of_columns


@triton.jit
def _load_P(
    p_ptr, columns, subspace, first, p_row_stride, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    Z_STEP: tl.constexpr,
):  # fmt: skip
    """Load P of the experts from `first` on as one matrix [PAD_H, PAD_D].

    Its columns are those of the step's z. If each expert reads columns of its own, the matrix is block diagonal.
    """
    mask = (first * R + columns < N * R)[:, None]
    if Z_STEP == 0:
        mask &= (subspace < D)[None, :]
    else:
        mask &= (columns // R)[:, None] == (subspace // D)[None, :]
    p_ptr += (first * R + columns)[:, None] * p_row_stride
    return tl.load(p_ptr + (subspace % D)[None, :], mask=mask, other=0.0)


@triton.jit
def _gate_kernel(
    down_out_ptr, splits_ptr, p_ptr, h_ptr, probability_ptr, T, down_out_stride, split_stride, h_stride, h_group_stride,
    p_group_stride, p_row_stride, SPLITS: tl.constexpr, SCALING: tl.constexpr, RENORMALIZE: tl.constexpr,
    Z_GROUP: tl.constexpr, L_GROUP: tl.constexpr, LOGITS_AT: tl.constexpr, Z_STEP: tl.constexpr, HAS_P: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, D: tl.constexpr, E_STEP: tl.constexpr, PAD_N: tl.constexpr,
    PAD_H: tl.constexpr, PAD_D: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write h and probability of a tile of tokens.

    Programs: (tile of tokens, projection). The layout constants are those of `GateLayout`. A program reads, and with
    splits writes, only its projection's columns of down_out.
    """
    group = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = (tokens < T)[:, None]
    experts = tl.arange(0, PAD_N)
    columns = tl.arange(0, PAD_H)
    subspace = tl.arange(0, PAD_D)
    l_mask = t_mask & (experts < N)[None, :]
    z_offsets = tokens[:, None] * down_out_stride + group * Z_GROUP
    l_offsets = tokens[:, None] * down_out_stride + LOGITS_AT + group * L_GROUP + experts[None, :]
    logits = _load_or_sum(down_out_ptr, splits_ptr, l_offsets, l_mask, split_stride, SPLITS)
    probability = _softmax(logits, experts, N, ACC)
    tl.store(probability_ptr + (group * T + tokens[:, None]) * N + experts[None, :], probability, mask=l_mask)
    gate = _gates(probability, _top_k_mask(probability, experts, N, K, PAD_N), RENORMALIZE) * SCALING
    if HAS_P and Z_STEP == 0:  # all experts read the same z
        z_mask = t_mask & (subspace < D)[None, :]
        z = _load_or_sum(down_out_ptr, splits_ptr, z_offsets + subspace[None, :], z_mask, split_stride, SPLITS)
    for first in range(0, N, E_STEP):
        h_mask = t_mask & (columns < min(E_STEP * R, N * R - first * R))[None, :]
        if HAS_P:
            if Z_STEP != 0:
                z_mask = t_mask & (subspace < min(E_STEP * D, N * D - first * D))[None, :]
                step_offsets = z_offsets + first * D + subspace[None, :]
                z = _load_or_sum(down_out_ptr, splits_ptr, step_offsets, z_mask, split_stride, SPLITS)
            p = _load_P(p_ptr + group * p_group_stride, columns, subspace, first, p_row_stride, N, R, D, Z_STEP)
            expert_out = tl.dot(z, tl.trans(p), input_precision="ieee", out_dtype=ACC)
        else:
            step_offsets = z_offsets + first * R + columns[None, :]
            expert_out = _load_or_sum(down_out_ptr, splits_ptr, step_offsets, h_mask, split_stride, SPLITS).to(ACC)
        h_offsets = group * h_group_stride + tokens[:, None] * h_stride + first * R + columns[None, :]
        tl.store(h_ptr + h_offsets, expert_out * _gate_of_columns(gate, experts, columns, first, R, E_STEP),
                 mask=h_mask)  # fmt: skip


@triton.jit
def _gate_backward_kernel(
    down_out_ptr, p_ptr, dh_ptr, dprobability_ptr, d_down_out_ptr, gated_dh_ptr, T, down_out_stride, d_down_out_stride,
    gated_dh_stride, h_stride, h_group_stride, p_group_stride, p_row_stride, HAS_DPROBABILITY: tl.constexpr,
    SCALING: tl.constexpr, RENORMALIZE: tl.constexpr, Z_GROUP: tl.constexpr, L_GROUP: tl.constexpr,
    LOGITS_AT: tl.constexpr, Z_STEP: tl.constexpr, HAS_P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, E_STEP: tl.constexpr, PAD_N: tl.constexpr, PAD_H: tl.constexpr,
    PAD_D: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write d_down_out and gated_dh of a tile of tokens.

    Programs: (tile of tokens, projection). Probabilities and expert outputs are recomputed from down_out. `h_stride`
    and `h_group_stride` are those of dh.
    """
    group = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = (tokens < T)[:, None]
    experts = tl.arange(0, PAD_N)
    columns = tl.arange(0, PAD_H)
    subspace = tl.arange(0, PAD_D)
    l_mask = t_mask & (experts < N)[None, :]
    z_ptr = down_out_ptr + tokens[:, None] * down_out_stride + group * Z_GROUP
    dz_ptr = d_down_out_ptr + tokens[:, None] * d_down_out_stride + group * Z_GROUP
    l_columns = LOGITS_AT + group * L_GROUP + experts[None, :]
    logits = tl.load(down_out_ptr + tokens[:, None] * down_out_stride + l_columns, mask=l_mask, other=0.0)
    probability = _softmax(logits, experts, N, ACC)
    chosen = _top_k_mask(probability, experts, N, K, PAD_N)
    unscaled_gate = _gates(probability, chosen, RENORMALIZE)
    gate = unscaled_gate * SCALING
    dgate = tl.zeros_like(probability)
    if HAS_P and Z_STEP == 0:
        z = tl.load(z_ptr + subspace[None, :], mask=t_mask & (subspace < D)[None, :], other=0.0)
        dz = tl.zeros([BLOCK_T, PAD_D], dtype=ACC)
    for first in range(0, N, E_STEP):
        h_mask = t_mask & (columns < min(E_STEP * R, N * R - first * R))[None, :]
        h_offsets = group * h_group_stride + tokens[:, None] * h_stride + first * R + columns[None, :]
        dh = tl.load(dh_ptr + h_offsets, mask=h_mask, other=0.0).to(ACC)
        if HAS_P:
            if Z_STEP != 0:
                z_mask = t_mask & (subspace < min(E_STEP * D, N * D - first * D))[None, :]
                z = tl.load(z_ptr + first * D + subspace[None, :], mask=z_mask, other=0.0)
            p = _load_P(p_ptr + group * p_group_stride, columns, subspace, first, p_row_stride, N, R, D, Z_STEP)
            expert_out = tl.dot(z, tl.trans(p), input_precision="ieee", out_dtype=ACC)
        else:
            expert_out = tl.load(z_ptr + first * R + columns[None, :], mask=h_mask, other=0.0).to(ACC)
        dgate_columns = dh * expert_out * SCALING
        for j in range(E_STEP):
            dgate_t = tl.sum(tl.where((columns // R == j)[None, :], dgate_columns, 0.0), 1)
            dgate += tl.where((experts == first + j)[None, :], dgate_t[:, None], 0.0)
        gated_dh = dh * _gate_of_columns(gate, experts, columns, first, R, E_STEP)
        if HAS_P:
            rounded = gated_dh.to(down_out_ptr.dtype.element_ty)
            offsets = (group * T + tokens[:, None]) * gated_dh_stride + first * R + columns[None, :]
            tl.store(gated_dh_ptr + offsets, rounded, mask=h_mask)
            dz_step = tl.dot(rounded, p, input_precision="ieee", out_dtype=ACC)
            if Z_STEP == 0:
                dz += dz_step
            else:
                tl.store(dz_ptr + first * D + subspace[None, :], dz_step, mask=z_mask)
        else:
            tl.store(dz_ptr + first * R + columns[None, :], gated_dh, mask=h_mask)
    if HAS_P and Z_STEP == 0:  # columns that pad D to Z_GROUP are written too: zeros
        tl.store(dz_ptr + subspace[None, :], dz, mask=t_mask & (subspace < Z_GROUP)[None, :])
    if RENORMALIZE:
        dgate = (dgate - tl.sum(unscaled_gate * dgate, 1)[:, None]) / tl.sum(probability * chosen, 1)[:, None]
    dprobability = dgate * chosen
    if HAS_DPROBABILITY:
        dprobability_ptr += (group * T + tokens[:, None]) * N
        dprobability += tl.load(dprobability_ptr + experts[None, :], mask=l_mask, other=0.0)
    dlogits = probability * (dprobability - tl.sum(probability * dprobability, 1)[:, None])
    tl.store(d_down_out_ptr + tokens[:, None] * d_down_out_stride + l_columns, dlogits, mask=l_mask)


@dataclass(frozen=True)
class GateLayout:
    """Sizes of the projections that are gated together, and the columns of `down_out`.

    A row of `down_out` holds z of each projection, then the logits of each projection:

        z of projection 0 | z of projection 1 | ... | logits of projection 0 | logits of projection 1 | ...

    Attributes:
        N: Experts of a projection.
        top_k: Experts chosen per token.
        r: Rank of an expert.
        D: Columns of P, the size of the z that one expert reads; r without P.
        z_step: Columns from the z of one expert to that of the next; 0 if all experts read the same z, else D.
        z_group: Columns from the z of one projection to that of the next, padding included.
        l_group: Columns from the logits of one projection to those of the next, padding included.
        logits_at: First column of the logits.
        has_p: Whether there is a P.
        scaling: Factor of the gates, LoRA's alpha / r.
        renormalize: Whether the gates of a token are divided by their sum.
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
    renormalize: bool = False

    @cache  # noqa: B019 - layouts are kept by `PackedLayout.from_sizes`, too
    def constants(self, dtype: torch.dtype, step_columns: int = MAX_STEP_COLUMNS) -> dict[str, Any]:
        """Return the compile-time constants of both kernels.

        Args:
            dtype: Dtype of down_out.
            step_columns: Bound of the columns of h per step of the loop, unless one expert alone has more.
        """
        steps = cdiv(self.N, max(1, step_columns // self.r))
        e_step = cdiv(self.N, steps)  # equal steps: of eight experts four and four, not five and three
        return {
            "SCALING": self.scaling, "RENORMALIZE": self.renormalize, "Z_GROUP": self.z_group, "L_GROUP": self.l_group,
            "LOGITS_AT": self.logits_at, "Z_STEP": self.z_step, "HAS_P": self.has_p,
            "N": self.N, "K": self.top_k, "R": self.r, "D": self.D,
            "E_STEP": e_step, "PAD_N": next_power_of_2(self.N), "PAD_H": tile_size(e_step * self.r),
            "PAD_D": tile_size(e_step * self.D if self.z_step else self.D),
            "ACC": accumulator_dtype(dtype), "BLOCK_T": BLOCK_T,
        }  # fmt: skip


def forward_stages(layout: GateLayout, splits: int) -> int:
    """Return `num_stages` of the forward kernel.

    The loads of a loop are prefetched. If experts read columns of their own, the loop loads z once per split, and that
    many prefetched tiles do not pay.
    """
    return 1 if splits and layout.z_step else 3


def gate(down_out: Tensor, P: Tensor | None, h: Tensor, layout: GateLayout, splits: Tensor | None = None) -> Tensor:
    """Route each token, and return the router probabilities.

    The gated expert outputs are written to h.

    Args:
        down_out: [T, columns], with any row stride; `layout` describes its columns. With splits it is written: their
            sum, rounded to its dtype. Padded columns keep their values.
        P: [G, N, r, ≥D], or None.
        h: [G, T, ≥H], written, with any stride between rows and projections. Columns from H on keep their values.
        layout: Sizes and columns.
        splits: [splits, T, columns] in float32 or wider, with the row stride of down_out, or None. See
            `down_forward.dropout_matmul_split_k`.

    Returns:
        [G, T, N] in float32 or wider.
    """
    G, T = h.shape[:2]
    probability = down_out.new_empty(G, T, layout.N, dtype=torch.promote_types(down_out.dtype, torch.float32))
    assert splits is None or splits.stride(1) == down_out.stride(0)
    count, split_stride = (0, 0) if splits is None else (len(splits), splits.stride(0))
    launch(
        _gate_kernel, (cdiv(T, BLOCK_T), G),
        down_out, splits, P, h, probability, T, down_out.stride(0), split_stride, h.stride(1), h.stride(0),
        *_strides(P), SPLITS=count, num_stages=forward_stages(layout, count), **layout.constants(down_out.dtype),
    )  # fmt: skip
    return probability


def gate_backward(
    down_out: Tensor, P: Tensor | None, dh: Tensor, dprobability: Tensor | None, d_down_out: Tensor, layout: GateLayout
) -> Tensor | None:
    """Write the gradient of down_out to d_down_out, and return gated_dh.

    Args:
        down_out: [T, columns], as `gate` left it, with any row stride.
        P: [G, N, r, ≥D] or None, as in `gate`.
        dh: [G, T, ≥H], the gradient of h, with any stride between rows and projections.
        dprobability: [G, T, N], contiguous, the gradient of the probabilities; None stands for zeros.
        d_down_out: [T, columns], written, with any row stride. Padding between the logits, and behind each z unless
            all experts share it, keeps its values.
        layout: Sizes and columns.

    Returns:
        [G, T, ≥H] in the dtype of dh, the gradient of P z, for which dP = gated_dhᵀ z. Columns from H on are
        uninitialized. None without P.
    """
    G, T = dh.shape[:2]
    gated_dh = dh.new_empty(dh.shape) if P is not None else None
    launch(
        _gate_backward_kernel, (cdiv(T, BLOCK_T), G),
        down_out, P, dh, dprobability, d_down_out, gated_dh, T, down_out.stride(0), d_down_out.stride(0), dh.shape[2],
        dh.stride(1), dh.stride(0), *_strides(P), HAS_DPROBABILITY=dprobability is not None,
        **layout.constants(down_out.dtype, backward_step_columns(layout)),
    )  # fmt: skip
    return gated_dh


def backward_step_columns(layout: GateLayout) -> int:
    """Return the columns per step of the backward kernel.

    With P, registers suffice for one expert per step.
    """
    return layout.r if layout.has_p else MAX_STEP_COLUMNS


def _strides(P: Tensor | None) -> tuple[int, int]:
    """Return the strides of P over projections and over rows, in elements.

    They lead from one projection's P to the next one's, and from one row of P to the next.
    """
    return (0, 0) if P is None else (P.stride(0), P.stride(2))
