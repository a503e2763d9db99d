"""Products of the down sides with dropout inside: the input is read once, and what dropout leaves is never written.

Routers see all inputs, so their rows of a product are computed from the same tile before it is masked.

Shapes: T tokens, n in, Z rows of down sides, L rows of routers, W = ⌈n/32⌉ words of mask. Sums are in float32, or
float64 where the data is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.backends.blocks import LEAST_RIGHT, blocks_of, finished, has_ptx, pad, shared, wide_of
from malora.backends.dropout import dropped, left_of, scale


@triton.jit
def _down_kernel(
    x_ptr, bits_ptr, down_ptr, zl_ptr, copy_ptr, T, n, W, x_stride, zl_stride, copy_stride, N_EACH: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_N: tl.constexpr, COPIES: tl.constexpr, SCALE: tl.constexpr, Z: tl.constexpr,
    REST: tl.constexpr, L: tl.constexpr, PAD_Z: tl.constexpr, PAD_REST: tl.constexpr, PAD_L: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    columns = part * N_EACH + tl.arange(0, BLOCK_N)
    words = part * (N_EACH // 32) + tl.arange(0, BLOCK_N // 32)
    row_inside = (rows < T)[:, None] | EVEN_T
    z_rows = tl.arange(0, PAD_Z)
    rest_rows = PAD_Z + tl.arange(0, PAD_REST)
    l_rows = Z + tl.arange(0, PAD_L)
    x_ptr += rows[:, None] * x_stride + columns[None, :]
    copy_ptr += rows[:, None] * copy_stride + columns[None, :]
    bits_ptr += rows[:, None] * W + words[None, :]
    down_ptr += columns[None, :]
    z = tl.zeros([BLOCK_T, PAD_Z], dtype=WIDE)
    rest = tl.zeros([BLOCK_T, PAD_REST], dtype=WIDE)
    logits = tl.zeros([BLOCK_T, PAD_L], dtype=WIDE)
    for start in range(0, N_EACH, BLOCK_N):
        column_inside = (columns + start < n)[None, :] | EVEN_N
        x = tl.load(x_ptr, mask=row_inside & column_inside, other=0.0)
        word = tl.load(bits_ptr, mask=row_inside & ((words + start // 32 < W)[None, :] | EVEN_N), other=0)
        d = tl.load(down_ptr + z_rows[:, None] * n, mask=(z_rows < Z)[:, None] & column_inside, other=0.0)
        if COPIES:
            tl.store(copy_ptr, x, mask=row_inside & column_inside)
            copy_ptr += BLOCK_N
        left = left_of(x, word, BLOCK_T, BLOCK_N, PTX)
        z = tl.dot(left, tl.trans(d), z, input_precision="ieee", out_dtype=WIDE)
        if REST > 0:
            d = tl.load(down_ptr + rest_rows[:, None] * n, mask=(rest_rows < Z)[:, None] & column_inside, other=0.0)
            rest = tl.dot(left, tl.trans(d), rest, input_precision="ieee", out_dtype=WIDE)
        if L > 0:
            g = tl.load(down_ptr + l_rows[:, None] * n, mask=(l_rows < Z + L)[:, None] & column_inside, other=0.0)
            logits = finished(tl.dot(x, tl.trans(g), logits, input_precision="ieee", out_dtype=WIDE), PTX)
        if REST > 0:
            rest = finished(rest, PTX)
        z = finished(z, PTX)
        x_ptr += BLOCK_N
        bits_ptr += BLOCK_N // 32
        down_ptr += BLOCK_N
    place = zl_ptr + (part.to(tl.int64) * T + rows)[:, None] * zl_stride
    tl.store(place + z_rows[None, :], z * SCALE, mask=row_inside & (z_rows < Z)[None, :])
    if REST > 0:
        tl.store(place + rest_rows[None, :], rest * SCALE, mask=row_inside & (rest_rows < Z)[None, :])
    if L > 0:
        tl.store(place + l_rows[None, :], logits, mask=row_inside & (l_rows < Z + L)[None, :])


@triton.jit
def _of_p(
    e_ptr, z_ptr, dp_ptr, rows, T, e_stride, z_stride, T_EACH: tl.constexpr, EVEN_T: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, PAD_H: tl.constexpr, PAD_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    ranks, columns = tl.arange(0, PAD_H), tl.arange(0, PAD_D)
    e_ptr += rows[:, None] * e_stride + ranks[None, :]
    z_ptr += rows[:, None] * z_stride + columns[None, :]
    total = tl.zeros([PAD_H, PAD_D], dtype=WIDE)
    for start in range(0, T_EACH, BLOCK_T):
        row_inside = (rows + start < T)[:, None] | EVEN_T
        e = tl.load(e_ptr, mask=row_inside & (ranks < H)[None, :], other=0.0)
        z = tl.load(z_ptr, mask=row_inside & (columns < D)[None, :], other=0.0)
        total = finished(tl.dot(tl.trans(e), z, total, input_precision="ieee", out_dtype=WIDE), PTX)
        e_ptr += BLOCK_T * e_stride
        z_ptr += BLOCK_T * z_stride
    tl.store(dp_ptr + ranks[:, None] * D + columns[None, :], total, mask=(ranks < H)[:, None] & (columns < D)[None, :])


@triton.jit
def _is_last(count_ptr, parts):
    """Whether this program is the last of so many that end; the count is zero again then."""
    tl.debug_barrier()  # all that its threads have stored comes before its count
    is_last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == parts - 1
    if is_last:
        tl.store(count_ptr, 0)
    return is_last


@triton.jit
def _add_up(parts_ptr, total_ptr, columns, column_inside, row_stride, part_stride, parts, ROWS: tl.constexpr,
            MOST_PARTS: tl.constexpr):  # fmt: skip
    """The sum of the parts of so many rows, in the order of the parts, which are loaded side by side."""
    for first in range(0, ROWS, 16):
        rows = first + tl.arange(0, 16)
        place = rows[:, None] * row_stride + columns[None, :]
        inside = (rows < ROWS)[:, None] & column_inside
        total = tl.load(parts_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")  # as others have left it
        for part in tl.static_range(1, MOST_PARTS):
            there = (rows < tl.where(part < parts, ROWS, 0))[:, None] & column_inside
            total += tl.load(parts_ptr + part * part_stride + place, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(total_ptr + place, total, mask=inside)


@triton.jit
def _gradients_kernel(
    dzl_ptr, x_ptr, bits_ptr, down_ptr, base_ptr, dx_ptr, parts_ptr, total_ptr, count_ptr, e_ptr, z_ptr, T, n, W,
    zl_stride, x_stride, base_stride, e_stride, e_group, z_stride, z_group, part_stride, G: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, PAD_H: tl.constexpr, PAD_D: tl.constexpr, MOST_PARTS: tl.constexpr,
    T_EACH: tl.constexpr, OF_INPUT: tl.constexpr, OF_WEIGHTS: tl.constexpr, ADDS: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_N: tl.constexpr, SCALE: tl.constexpr, Z: tl.constexpr, REST: tl.constexpr, L: tl.constexpr,
    PAD_Z: tl.constexpr, PAD_REST: tl.constexpr, PAD_L: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(1), tl.num_programs(1)
    rows = part.to(tl.int64) * T_EACH + tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(0) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    column_inside = (columns < n)[None, :] | EVEN_N
    part_stride = part_stride.to(tl.int64)
    blocks = tl.cdiv(n, BLOCK_N)
    if tl.program_id(0) >= blocks:  # has no columns, and makes gradients of P
        if OF_WEIGHTS:
            parts_ptr += (Z + L) * n
            total_ptr += (Z + L) * n
        out_ptr = parts_ptr + part * part_stride
        for g in range(G):
            if g % (tl.num_programs(0) - blocks) == tl.program_id(0) - blocks:
                _of_p(e_ptr + g * e_group, z_ptr + g * z_group, out_ptr + g * H * D, rows, T, e_stride, z_stride,
                      T_EACH, EVEN_T, H, D, PAD_H, PAD_D, WIDE, BLOCK_T, PTX)  # fmt: skip
        if MOST_PARTS > 1:  # noqa: SIM102 (Triton would count before it knew of how many)
            if _is_last(count_ptr + tl.program_id(0), parts):
                subspace = tl.arange(0, PAD_D)
                for g in range(G):
                    if g % (tl.num_programs(0) - blocks) == tl.program_id(0) - blocks:
                        at = g * H * D
                        _add_up(parts_ptr + at, total_ptr + at, subspace, (subspace < D)[None, :], D, part_stride,
                                parts, H, MOST_PARTS)  # fmt: skip
        return
    z_rows = tl.arange(0, PAD_Z)
    rest_rows = PAD_Z + tl.arange(0, PAD_REST)
    l_rows = Z + tl.arange(0, PAD_L)
    place = rows[:, None] * n + columns[None, :]
    dzl_ptr += rows[:, None] * zl_stride
    bits_ptr += rows[:, None] * W + words[None, :]
    x_ptr += rows[:, None] * x_stride + columns[None, :]
    base_ptr += rows[:, None] * base_stride + columns[None, :]
    dx_ptr += place
    down_ptr += columns[None, :]
    if OF_INPUT:
        d = tl.load(down_ptr + z_rows[:, None] * n, mask=(z_rows < Z)[:, None] & column_inside, other=0.0)
        if REST > 0:
            r = tl.load(down_ptr + rest_rows[:, None] * n, mask=(rest_rows < Z)[:, None] & column_inside, other=0.0)
        if L > 0:
            g = tl.load(down_ptr + l_rows[:, None] * n, mask=(l_rows < Z + L)[:, None] & column_inside, other=0.0)
    # Columns by rows, not rows by columns: of a product's left side a block is 64 on Hopper, of its right one 16 do.
    z_sum = tl.zeros([BLOCK_N, PAD_Z], dtype=WIDE)
    rest_sum = tl.zeros([BLOCK_N, PAD_REST], dtype=WIDE)
    l_sum = tl.zeros([BLOCK_N, PAD_L], dtype=WIDE)
    for start in range(0, T_EACH, BLOCK_T):
        row_inside = (rows + start < T)[:, None] | EVEN_T
        word = tl.load(bits_ptr, mask=row_inside & ((words < W)[None, :] | EVEN_N), other=0)
        dz = tl.load(dzl_ptr + z_rows[None, :], mask=row_inside & (z_rows < Z)[None, :], other=0.0)
        if REST > 0:
            drest = tl.load(dzl_ptr + rest_rows[None, :], mask=row_inside & (rest_rows < Z)[None, :], other=0.0)
        if L > 0:
            dl = tl.load(dzl_ptr + l_rows[None, :], mask=row_inside & (l_rows < Z + L)[None, :], other=0.0)
        if OF_WEIGHTS:
            x = tl.load(x_ptr, mask=row_inside & column_inside, other=0.0)
        if OF_INPUT:
            dx = tl.dot(dz, d, input_precision="ieee", out_dtype=WIDE)
            if REST > 0:
                dx = tl.dot(drest, r, dx, input_precision="ieee", out_dtype=WIDE)
            dx = left_of(dx * SCALE, word, BLOCK_T, BLOCK_N, PTX)
            if L > 0:
                dx = tl.dot(dl, g, dx, input_precision="ieee", out_dtype=WIDE)
            if ADDS:
                dx += tl.load(base_ptr, mask=row_inside & column_inside)
            tl.store(dx_ptr, dx, mask=row_inside & column_inside)
        if OF_WEIGHTS:
            left = tl.trans(left_of(x, word, BLOCK_T, BLOCK_N, PTX))
            z_sum = tl.dot(left, dz, z_sum, input_precision="ieee", out_dtype=WIDE)
            if REST > 0:
                rest_sum = tl.dot(left, drest, rest_sum, input_precision="ieee", out_dtype=WIDE)
            if L > 0:
                l_sum = tl.dot(tl.trans(x), dl, l_sum, input_precision="ieee", out_dtype=WIDE)
                l_sum = finished(l_sum, PTX)
            if REST > 0:
                rest_sum = finished(rest_sum, PTX)
            z_sum = finished(z_sum, PTX)
        dzl_ptr += BLOCK_T * zl_stride
        bits_ptr += BLOCK_T * W
        x_ptr += BLOCK_T * x_stride
        base_ptr += BLOCK_T * base_stride
        dx_ptr += BLOCK_T * n
    if OF_WEIGHTS:
        out_ptr = parts_ptr + part * part_stride + columns[None, :]
        tl.store(out_ptr + z_rows[:, None] * n, tl.trans(z_sum) * SCALE, mask=(z_rows < Z)[:, None] & column_inside)
        if REST > 0:
            tl.store(out_ptr + rest_rows[:, None] * n, tl.trans(rest_sum) * SCALE,
                     mask=(rest_rows < Z)[:, None] & column_inside)  # fmt: skip
        if L > 0:
            tl.store(out_ptr + l_rows[:, None] * n, tl.trans(l_sum), mask=(l_rows < Z + L)[:, None] & column_inside)
        if MOST_PARTS > 1:  # noqa: SIM102 (Triton would count before it knew of how many)
            if _is_last(count_ptr + tl.program_id(0), parts):
                _add_up(parts_ptr, total_ptr, columns, column_inside, n, part_stride, parts, Z + L, MOST_PARTS)


# The fastest of those tried on an H100 at 4,096 tokens and inputs of 4,096 and 11,008.
DOWN = {"BLOCK_T": 64, "BLOCK_N": 64, "num_stages": 3}
GRADIENTS = {"BLOCK_T": 64, "BLOCK_N": 64, "num_stages": 3}
PROGRAMS = 264  # two for each multiprocessor of an H100
LEAST_BLOCKS = 16  # of columns in a part of a sum; not tuned again since the gate's kernel adds up the parts
MOST_FOR_P = 2  # programs
MOST_OF_P = 128 * 64  # elements of a gradient of P that one program sums up
MOST_ROWS = 256  # of down sides, and of routers beside them; the sums of a block of tokens stay in registers


def _plainly(x: Tensor, Z: int, L: int) -> bool:
    """Whether plain products of a dropped input are better: of many rows a block does not fit, nor of wide elements,
    and the arithmetic, which tensor cores do not do in full float32, then outweighs the passes over the input. Of no
    tokens there are no blocks."""
    if Z > MOST_ROWS or L > MOST_ROWS or not x.numel() or (x.is_cuda and x.element_size() > 2):
        return True
    return not (_stages(DOWN, Z, L, x.device) and _stages(GRADIENTS, Z, L, x.device))


def _parts(blocks: int, others: int, programs: int = PROGRAMS) -> int:
    """In how many parts a sum is cut where `blocks` programs leave the device idle; a power of two, at most `others`.

    The parts are added up in a fixed order, and few different numbers mean few compilations.
    """
    return min(2 ** max(0, round(math.log2(programs / blocks))), triton.next_power_of_2(max(1, others)))


def down(
    x: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float, copy: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """[dropout(x) Dᵀ, x Gᵀ]: [T, Z + L] of x [T, n]; weights are the Z rows of D above the L of G.

    Where there is a `copy` [T, n], x is written into it: it is read anyway. Its rows and those of `out` lie anywhere.
    """
    zl, parts = down_in_parts(x, bits, weights, Z, p, copy)
    if out is None:
        return zl if parts is None else zl.copy_(parts.sum(0))
    return out.copy_(zl if parts is None else parts.sum(0))


def down_in_parts(
    x: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float, copy: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What `down` gives and None; or room for that, unwritten, and what it is the sum of.

    The latter is [parts, T, Z + L] in float32 or wider. Rows are as far apart in both.
    """
    (T, n), columns = x.shape, len(weights)
    zl = rows_of(x, columns)
    if _plainly(x, Z, columns - Z):
        torch.mm(dropped(x, bits, p), weights[:Z].T, out=zl[:, :Z])
        torch.mm(x, weights[Z:].T, out=zl[:, Z:])
        if copy is not None:
            copy.copy_(x)
        return zl, None
    blocks, blocks_n = triton.cdiv(T, DOWN["BLOCK_T"]), triton.cdiv(n, DOWN["BLOCK_N"])
    n_each = triton.cdiv(blocks_n, _parts(blocks, blocks_n // LEAST_BLOCKS)) * DOWN["BLOCK_N"]
    count, parts = triton.cdiv(n, n_each), None
    if count > 1:
        parts = x.new_empty(count, T, zl.stride(0), dtype=torch.promote_types(x.dtype, torch.float32))[..., :columns]
    _down_kernel[(blocks, count)](
        x, bits, weights, zl if parts is None else parts, x if copy is None else copy, T, n, bits.shape[1],
        x.stride(0), zl.stride(0), 0 if copy is None else copy.stride(0), n_each, EVEN_T=T % DOWN["BLOCK_T"] == 0,
        EVEN_N=n % n_each == 0, COPIES=copy is not None, **_sizes(weights, Z, p),
        **_fitting(DOWN, Z, columns - Z, x.device),
    )  # fmt: skip
    return zl, parts


class OfP(NamedTuple):
    """What the gradients of P are made of: dP [G, H, D] = eᵀ z, of e [G, T, ≥H] and z [G, T, ≥D]."""

    e: Tensor
    z: Tensor
    H: int
    D: int

    @property
    def is_small(self) -> bool:
        """Whether its sums stay in the registers of one program."""
        return pad(self.H) * pad(self.D) <= MOST_OF_P

    def summed(self) -> Tensor:
        return summed(self.e, self.z)[:, : self.H, : self.D]


def gradients(
    dzl: Tensor, x: Tensor, bits: Tensor | None, weights: Tensor, Z: int, p: float, base: Tensor | None = None,
    of_input: bool = True, of_weights: bool = True, of_p: OfP | None = None, counts: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dropout(dz D) + dl G + base, [T, n]; [dzᵀ dropout(x); dlᵀ x], [Z + L, n], and dP in float32 or wider; or None.

    Of dzl [T, Z + L], x [T, n], weights [Z + L, n] and, if there is one, `base` [T, n], in rows anywhere. Without bits
    nothing was dropped. `counts` are of `counts_for`, not in use elsewhere at the same time; if None, they are made.
    """
    dx = dweights = dP = None
    if not (of_input or of_weights or of_p):
        return dx, dweights, dP
    if bits is None:
        if of_input:
            dx = dzl @ weights if base is None else torch.addmm(base, dzl, weights)
        return dx, summed(dzl, x) if of_weights else None, of_p and of_p.summed()
    if _plainly(x, Z, len(weights) - Z):
        if of_input:
            dx = dropped(dzl[:, :Z] @ weights[:Z], bits, p)
            dx = (dx if base is None else dx.add_(base)).addmm_(dzl[:, Z:], weights[Z:])
        if of_weights:
            dweights = torch.cat([summed(dzl[:, :Z], dropped(x, bits, p)), summed(dzl[:, Z:], x)])
        return dx, dweights, of_p and of_p.summed()
    (T, n), rows = x.shape, len(weights)
    joins = of_p is not None and of_p.is_small
    e, z, H, D = of_p if joins else (dzl[None], dzl[None], 1, 1)
    sizes = [rows * n * of_weights, len(e) * H * D * joins]
    tuned = _fitting(GRADIENTS, Z, rows - Z, x.device)
    blocks, blocks_T = triton.cdiv(n, GRADIENTS["BLOCK_N"]), triton.cdiv(T, GRADIENTS["BLOCK_T"])
    fits_twice = 2 * _bytes(GRADIENTS, Z, rows - Z, tuned["num_stages"]) <= shared(x.device)
    each = triton.cdiv(blocks_T, _parts(blocks, blocks_T, PROGRAMS if fits_twice else PROGRAMS // 2))
    T_each = triton.next_power_of_2(each) * GRADIENTS["BLOCK_T"]  # a power of two of blocks, for few compilations
    parts = triton.cdiv(T, T_each)
    if of_input:
        dx = x.new_empty(T, n)
    wide = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    sums = torch.empty(parts, sum(sizes), **wide)
    total = torch.empty(sum(sizes), **wide) if parts > 1 else sums[0]
    if counts is None and parts > 1:
        counts = counts_for(x)
    # Two for the gradients of P: one of three siblings would be the last to end.
    _gradients_kernel[blocks + min(MOST_FOR_P, len(e) * joins), parts](
        dzl, x, bits, weights, x if base is None else base, x if dx is None else dx, sums, total, counts, e, z, T, n,
        bits.shape[1], dzl.stride(0), x.stride(0), 0 if base is None else base.stride(0), e.stride(1), e.stride(0),
        z.stride(1), z.stride(0), sum(sizes), G=len(e) * joins, H=H, D=D, PAD_H=pad(H), PAD_D=pad(D, LEAST_RIGHT),
        MOST_PARTS=triton.next_power_of_2(parts), T_EACH=T_each, OF_INPUT=of_input, OF_WEIGHTS=of_weights,
        ADDS=base is not None, EVEN_T=T % T_each == 0, EVEN_N=n % GRADIENTS["BLOCK_N"] == 0, **_sizes(weights, Z, p),
        **tuned,
    )  # fmt: skip
    of_rows, of_ranks = total.split(sizes)
    if of_weights:
        dweights = of_rows.view(rows, n)
    if of_p is not None:
        dP = of_ranks.view(-1, H, D) if joins else of_p.summed()
    return dx, dweights, dP


def counts_for(x: Tensor) -> Tensor:
    """Zeros, by which the programs of `gradients` know who of them adds up the parts of a sum; they are zero after it.

    Of x [T, n].
    """
    return x.new_zeros(triton.cdiv(x.shape[1], GRADIENTS["BLOCK_N"]) + MOST_FOR_P, dtype=torch.int32)


def summed(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right of [..., T, a] and [..., T, b], summed and kept in float32 or wider."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left.mT, right, out_dtype=torch.float32)
    return (left.mT @ right).to(torch.promote_types(left.dtype, torch.float32))


def rows_of(x: Tensor, columns: int) -> Tensor:
    """Like x.new_empty(len(x), columns), in rows that begin at multiples of 16 elements.

    Otherwise Triton reads and writes an element at a time; the products were four times slower.
    """
    return x.new_empty(len(x), -(-columns // 16) * 16)[:, :columns]


def _bytes(tuned: dict[str, int], Z: int, L: int, stages: int) -> int:
    """Of shared memory, for elements of two, as Triton 3.6 lays them out for Hopper.

    Loads have a block for each stage. The gradients keep a block of the weights, and lay out one of x anew.
    """
    T, n, z = tuned["BLOCK_T"], tuned["BLOCK_N"], blocks_of(Z)
    rows = z["first"] + (z["pad_rest"] if z["rest"] else 0) + (pad(L) if L else 0)
    kept, loaded = (2 * (T + rows) * n, T) if tuned is GRADIENTS else (0, n)
    return 1024 + kept + stages * 2 * (T * n + rows * loaded)


def _stages(tuned: dict[str, int], Z: int, L: int, device: torch.device) -> int:
    """Stages of loads that shared memory has room for, at most those of `tuned`; 0 if for none."""
    return max(s for s in range(tuned["num_stages"] + 1) if not s or _bytes(tuned, Z, L, s) <= shared(device))


def _fitting(tuned: dict[str, int], Z: int, L: int, device: torch.device) -> dict[str, int]:
    """`tuned`, with as many stages as fit, and more warps where there are many rows."""
    return tuned | {"num_stages": _stages(tuned, Z, L, device), "num_warps": 4 if Z + L <= 224 else 8}


def _sizes(weights: Tensor, Z: int, p: float) -> dict[str, Any]:
    L, z = len(weights) - Z, blocks_of(Z)
    return {
        "SCALE": scale(p), "Z": Z, "L": L, "PAD_Z": z["first"], "REST": z["rest"], "PAD_REST": z["pad_rest"],
        "PAD_L": pad(L), "WIDE": wide_of(weights.dtype), "PTX": has_ptx(weights),
    }  # fmt: skip
