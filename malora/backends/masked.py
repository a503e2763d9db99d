"""Products of the down sides with dropout inside: the input is read once, and what dropout leaves is never written.

Routers see all inputs, so their rows of a product are computed from the same tile before it is masked.

Shapes: T tokens, n in, Z rows of down sides, L rows of routers, W = ⌈n/32⌉ words of mask. Sums are in float32, or
float64 where the data is.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.backends.dropout import dropped, left_of, scale


@triton.jit
def _finished(sums, PTX: tl.constexpr):
    """The sums of a product, float32, once it has ended."""
    # On Hopper a product may run on while its loop writes the registers (Triton 3.6, its issue 9433) or the buffer that
    # it still reads, and AsyLoRA trained to NaN. Whoever reads the sums waits for them; ptxas drops the mov.
    if PTX:
        sums = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [sums], dtype=tl.float32, is_pure=True, pack=1)
    return sums


@triton.jit
def _down_kernel(
    x_ptr, bits_ptr, down_ptr, zl_ptr, copy_ptr, T, n, W, zl_stride, copy_stride, N_EACH: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_N: tl.constexpr, COPIES: tl.constexpr, SCALE: tl.constexpr, Z: tl.constexpr,
    L: tl.constexpr, PAD_Z: tl.constexpr, PAD_L: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    columns = part * N_EACH + tl.arange(0, BLOCK_N)
    words = part * (N_EACH // 32) + tl.arange(0, BLOCK_N // 32)
    row_inside = (rows < T)[:, None] | EVEN_T
    z_rows = tl.arange(0, PAD_Z)
    l_rows = tl.arange(0, PAD_L)
    x_ptr += rows[:, None] * n + columns[None, :]
    copy_ptr += rows[:, None] * copy_stride + columns[None, :]
    bits_ptr += rows[:, None] * W + words[None, :]
    z_ptr = down_ptr + z_rows[:, None] * n + columns[None, :]
    l_ptr = down_ptr + (Z + l_rows)[:, None] * n + columns[None, :]
    z = tl.zeros([BLOCK_T, PAD_Z], dtype=WIDE)
    logits = tl.zeros([BLOCK_T, PAD_L], dtype=WIDE)
    for start in range(0, N_EACH, BLOCK_N):
        column_inside = (columns + start < n)[None, :] | EVEN_N
        x = tl.load(x_ptr, mask=row_inside & column_inside, other=0.0)
        word = tl.load(bits_ptr, mask=row_inside & ((words + start // 32 < W)[None, :] | EVEN_N), other=0)
        d = tl.load(z_ptr, mask=(z_rows < Z)[:, None] & column_inside, other=0.0)
        if COPIES:
            tl.store(copy_ptr, x, mask=row_inside & column_inside)
            copy_ptr += BLOCK_N
        left = left_of(x, word, BLOCK_T, BLOCK_N, PTX)
        z = tl.dot(left, tl.trans(d), z, input_precision="ieee", out_dtype=WIDE)
        if L > 0:
            g = tl.load(l_ptr, mask=(l_rows < L)[:, None] & column_inside, other=0.0)
            logits = _finished(tl.dot(x, tl.trans(g), logits, input_precision="ieee", out_dtype=WIDE), PTX)
        z = _finished(z, PTX)
        x_ptr += BLOCK_N
        bits_ptr += BLOCK_N // 32
        z_ptr += BLOCK_N
        l_ptr += BLOCK_N
    place = zl_ptr + (part.to(tl.int64) * T + rows)[:, None] * zl_stride
    tl.store(place + z_rows[None, :], z * SCALE, mask=row_inside & (z_rows < Z)[None, :])
    if L > 0:
        tl.store(place + Z + l_rows[None, :], logits, mask=row_inside & (l_rows < L)[None, :])


@triton.jit
def _input_gradient_kernel(
    dzl_ptr, bits_ptr, down_ptr, base_ptr, dx_ptr, T, n, W, zl_stride, base_stride, T_EACH: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_N: tl.constexpr, SCALE: tl.constexpr, Z: tl.constexpr, L: tl.constexpr,
    PAD_Z: tl.constexpr, PAD_L: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    ADDS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * T_EACH + tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(0) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    column_inside = (columns < n)[None, :] | EVEN_N
    z_rows = tl.arange(0, PAD_Z)
    l_rows = tl.arange(0, PAD_L)
    d = tl.load(down_ptr + z_rows[:, None] * n + columns[None, :],
                mask=(z_rows < Z)[:, None] & column_inside, other=0.0)  # fmt: skip
    if L > 0:
        g = tl.load(down_ptr + (Z + l_rows)[:, None] * n + columns[None, :],
                    mask=(l_rows < L)[:, None] & column_inside, other=0.0)  # fmt: skip
    z_ptr = dzl_ptr + rows[:, None] * zl_stride + z_rows[None, :]
    l_ptr = dzl_ptr + rows[:, None] * zl_stride + (Z + l_rows)[None, :]
    bits_ptr += rows[:, None] * W + words[None, :]
    base_ptr += rows[:, None] * base_stride + columns[None, :]
    dx_ptr += rows[:, None] * n + columns[None, :]
    for start in range(0, T_EACH, BLOCK_T):
        row_inside = (rows + start < T)[:, None] | EVEN_T
        dz = tl.load(z_ptr, mask=row_inside & (z_rows < Z)[None, :], other=0.0)
        word = tl.load(bits_ptr, mask=row_inside & ((words < W)[None, :] | EVEN_N), other=0)
        dx = tl.dot(dz, d, input_precision="ieee", out_dtype=WIDE) * SCALE
        dx = left_of(dx, word, BLOCK_T, BLOCK_N, PTX)
        if L > 0:
            dl = tl.load(l_ptr, mask=row_inside & (l_rows < L)[None, :], other=0.0)
            dx = tl.dot(dl, g, dx, input_precision="ieee", out_dtype=WIDE)
        if ADDS:
            dx += tl.load(base_ptr, mask=row_inside & column_inside)
            base_ptr += BLOCK_T * base_stride
        tl.store(dx_ptr, dx, mask=row_inside & column_inside)
        z_ptr += BLOCK_T * zl_stride
        l_ptr += BLOCK_T * zl_stride
        bits_ptr += BLOCK_T * W
        dx_ptr += BLOCK_T * n


@triton.jit
def _weight_gradient_kernel(
    dzl_ptr, x_ptr, bits_ptr, out_ptr, T, n, W, zl_stride, x_stride, T_EACH: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_N: tl.constexpr, SCALE: tl.constexpr, Z: tl.constexpr, L: tl.constexpr, PAD_Z: tl.constexpr,
    PAD_L: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    rows = part.to(tl.int64) * T_EACH + tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(0) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    column_inside = (columns < n)[None, :] | EVEN_N
    z_rows = tl.arange(0, PAD_Z)
    l_rows = tl.arange(0, PAD_L)
    x_ptr += rows[:, None] * x_stride + columns[None, :]
    bits_ptr += rows[:, None] * W + words[None, :]
    z_ptr = dzl_ptr + rows[:, None] * zl_stride + z_rows[None, :]
    l_ptr = dzl_ptr + rows[:, None] * zl_stride + (Z + l_rows)[None, :]
    z_sum = tl.zeros([PAD_Z, BLOCK_N], dtype=WIDE)
    l_sum = tl.zeros([PAD_L, BLOCK_N], dtype=WIDE)
    for start in range(0, T_EACH, BLOCK_T):
        row_inside = (rows + start < T)[:, None] | EVEN_T
        x = tl.load(x_ptr, mask=row_inside & column_inside, other=0.0)
        word = tl.load(bits_ptr, mask=row_inside & ((words < W)[None, :] | EVEN_N), other=0)
        dz = tl.load(z_ptr, mask=row_inside & (z_rows < Z)[None, :], other=0.0)
        left = left_of(x, word, BLOCK_T, BLOCK_N, PTX)
        z_sum = tl.dot(tl.trans(dz), left, z_sum, input_precision="ieee", out_dtype=WIDE)
        if L > 0:
            dl = tl.load(l_ptr, mask=row_inside & (l_rows < L)[None, :], other=0.0)
            l_sum = _finished(tl.dot(tl.trans(dl), x, l_sum, input_precision="ieee", out_dtype=WIDE), PTX)
        x_ptr += BLOCK_T * x_stride
        bits_ptr += BLOCK_T * W
        z_ptr += BLOCK_T * zl_stride
        l_ptr += BLOCK_T * zl_stride
    out_ptr += part.to(tl.int64) * (Z + L) * n
    tl.store(out_ptr + z_rows[:, None] * n + columns[None, :], z_sum * SCALE,
             mask=(z_rows < Z)[:, None] & column_inside)  # fmt: skip
    if L > 0:
        tl.store(out_ptr + (Z + l_rows)[:, None] * n + columns[None, :], l_sum,
                 mask=(l_rows < L)[:, None] & column_inside)  # fmt: skip


# The fastest of those tried on an H100 at 4,096 tokens and inputs of 4,096 and 11,008; rows of output beyond 128 want
# more warps.
DOWN = {"BLOCK_T": 64, "BLOCK_N": 64, "num_stages": 3}
INPUT_GRADIENT = {"BLOCK_T": 64, "BLOCK_N": 128, "num_stages": 3}
WEIGHT_GRADIENT = {"BLOCK_T": 64, "BLOCK_N": 64, "num_stages": 3}
PROGRAMS = 264  # two for each multiprocessor of an H100
LEAST_BLOCKS = 16  # of columns in a part of a sum; not tuned again since the gate's kernel adds up the parts
LEAST_ROWS = 64  # of a weight gradient: what Hopper multiplies at once, from shared memory; fewer go through registers
HOPPERS = 227 << 10  # bytes of shared memory that a block of threads can have on an H100
MOST_ROWS = 256  # of down sides, and of routers beside them; the sums of a block of tokens stay in registers


def _plainly(x: Tensor, Z: int, L: int) -> bool:
    """Whether plain products of a dropped input are better: of many rows a block does not fit, nor of wide elements,
    and the arithmetic, which tensor cores do not do in full float32, then outweighs the passes over the input. Of no
    tokens there are no blocks."""
    if Z > MOST_ROWS or L > MOST_ROWS or not x.numel() or (x.is_cuda and x.element_size() > 2):
        return True
    rows = _rows(Z, L, LEAST_ROWS)
    return not (_stages(DOWN, rows, x.device) and _stages(INPUT_GRADIENT, rows, x.device, keeps_weights=True))


def _parts(blocks: int, others: int) -> int:
    """In how many parts a sum is cut where `blocks` programs leave the device idle; a power of two, at most `others`.

    The parts are added up in a fixed order, and few different numbers mean few compilations.
    """
    return min(2 ** max(0, round(math.log2(PROGRAMS / blocks))), triton.next_power_of_2(max(1, others)))


def _cut(T: int, n: int, tuned: dict[str, int]) -> tuple[int, int]:
    """Blocks of columns, and tokens a program: a power of two of blocks, for few compilations."""
    blocks, blocks_T = triton.cdiv(n, tuned["BLOCK_N"]), triton.cdiv(T, tuned["BLOCK_T"])
    return blocks, triton.next_power_of_2(triton.cdiv(blocks_T, _parts(blocks, blocks_T))) * tuned["BLOCK_T"]


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
        zl.stride(0), 0 if copy is None else copy.stride(0), n_each, EVEN_T=T % DOWN["BLOCK_T"] == 0,
        EVEN_N=n % n_each == 0, COPIES=copy is not None, PTX=_has_ptx(x), **_sizes(weights, Z, p),
        **_fitting(DOWN, Z, columns - Z, x.device),
    )  # fmt: skip
    return zl, parts


def input_gradient(dzl: Tensor, bits: Tensor, weights: Tensor, Z: int, p: float, base: Tensor | None = None) -> Tensor:
    """dropout(dz D) + dl G + base: [T, n] of dzl [T, Z + L] and `base` [T, n], if there is one, in rows anywhere."""
    if _plainly(dzl, Z, len(weights) - Z):
        dx = dropped(dzl[:, :Z] @ weights[:Z], bits, p)
        return (dx if base is None else dx.add_(base)).addmm_(dzl[:, Z:], weights[Z:])
    T, n = len(dzl), weights.shape[1]
    dx = dzl.new_empty(T, n)
    blocks, T_each = _cut(T, n, INPUT_GRADIENT)
    tuned = _fitting(INPUT_GRADIENT, Z, len(weights) - Z, dzl.device, keeps_weights=True)
    _input_gradient_kernel[blocks, triton.cdiv(T, T_each)](
        dzl, bits, weights, dx if base is None else base, dx, T, n, bits.shape[1], dzl.stride(0),
        0 if base is None else base.stride(0), T_each, EVEN_T=T % T_each == 0,
        EVEN_N=n % INPUT_GRADIENT["BLOCK_N"] == 0, ADDS=base is not None, PTX=_has_ptx(dzl),
        **_sizes(weights, Z, p), **tuned,
    )  # fmt: skip
    return dx


def weight_gradient(dzl: Tensor, x: Tensor, bits: Tensor, Z: int, p: float) -> Tensor:
    """[dzᵀ dropout(x); dlᵀ x]: [Z + L, n] in float32 or wider, of dzl [T, Z + L]; rows of x may lie anywhere."""
    if _plainly(x, Z, dzl.shape[1] - Z):
        return torch.cat([summed(dzl[:, :Z], dropped(x, bits, p)), summed(dzl[:, Z:], x)])
    (T, n), rows = x.shape, dzl.shape[1]
    blocks, T_each = _cut(T, n, WEIGHT_GRADIENT)
    parts = triton.cdiv(T, T_each)
    out = torch.empty(parts, rows, n, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    _weight_gradient_kernel[(blocks, parts)](
        dzl, x, bits, out, T, n, bits.shape[1], dzl.stride(0), x.stride(0), T_each, EVEN_T=T % T_each == 0,
        EVEN_N=n % WEIGHT_GRADIENT["BLOCK_N"] == 0, PTX=_has_ptx(x),
        **_sizes(dzl.T, Z, p, LEAST_ROWS), **_fitting(WEIGHT_GRADIENT, Z, rows - Z, x.device, LEAST_ROWS),
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


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


def _has_ptx(x: Tensor) -> bool:
    return x.is_cuda and not torch.version.hip


def _rows(Z: int, L: int, least: int) -> int:
    """Rows of weights that a block has, with what pads them."""
    return _pad(Z, least) + (_pad(L, least) if L else 0)


def _stages(tuned: dict[str, int], rows: int, device: torch.device, keeps_weights: bool = False) -> int:
    """Stages of loads that shared memory has room for, at most those of `tuned`; 0 if for none.

    The input's gradient keeps its weights and loads rows of dzl; the others load x and the weights, or dzl, by stages.
    In bytes, for elements of two, as Triton 3.6 lays them out for Hopper.
    """
    T, n = tuned["BLOCK_T"], tuned["BLOCK_N"]
    kept, stage = (2 * (T + rows) * n, 2 * rows * T) if keeps_weights else (1024, 2 * (T + rows) * n)
    return max(0, min(tuned["num_stages"], (_shared(device) - kept) // stage))


def _fitting(
    tuned: dict[str, int], Z: int, L: int, device: torch.device, least: int = 16, keeps_weights: bool = False
) -> dict[str, int]:
    """`tuned`, with as many stages as fit."""
    return tuned | {"num_stages": _stages(tuned, _rows(Z, L, least), device, keeps_weights)}


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else HOPPERS


def _sizes(weights: Tensor, Z: int, p: float, least: int = 16) -> dict[str, Any]:
    L = len(weights) - Z
    wide = tl.float64 if weights.dtype == torch.float64 else tl.float32
    pads = {"PAD_Z": _pad(Z, least), "PAD_L": _pad(L, least), "num_warps": 4 if Z <= 128 else 8}
    return {"SCALE": scale(p), "Z": Z, "L": L, "WIDE": wide, **pads}


def _pad(size: int, least: int) -> int:
    return max(least, triton.next_power_of_2(size))  # tl.dot takes no less than 16
