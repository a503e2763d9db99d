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
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from malora.backends import is_captured
from malora.backends.lanes import side_by_side
from malora.siblings import say_once

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = torch.finfo(torch.float32).tiny  # as a scale: a row of zeros has one too, and its inverse is finite
MULTIPLE = 16  # of both sides of a weight and of the room beside it, by torch._scaled_mm
LINE = 128  # bytes of a cache's line: products of rows that begin with one take 1 to 4% less, in a probe on an H100
# What a row of a weight counts for at least, as a share of the siblings' largest, and in all. The smaller it is, the
# larger is what lies beside x, whose scale is that of all its row.
LEAST_SHARE, LEAST = 2.0**-8, 2.0**-64
Work = Callable[[], Any]


class Rows(NamedTuple):
    """A matrix, rounded: row i is scale_i · values_i."""

    values: Tensor  # [rows, columns] float8_e4m3fn
    scale: Tensor  # [rows, 1] float32

    def wide(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype) * self.scale.to(dtype)


class Up(NamedTuple):
    """What lies beside x: h of each sibling, and what it is multiplied by."""

    h: Tensor  # [G, T, H]
    unit: Tensor  # [G, C] float32


@triton.jit
def _rounded_kernel(
    parts, h_ptr, unit_ptr, least_ptr, values_ptr, scale_ptr, h_stride, h_group, values_stride, WIDTHS: tl.constexpr,
    ALPHA: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, C: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_ROOM: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
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
    scale = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST)
    tl.store(scale_ptr + row, scale * ALPHA)
    inverse = tl.div_rn(1.0, scale)
    values_ptr += row * values_stride
    for part in tl.static_range(len(parts)):
        tl.store(values_ptr + columns, (read[part] * inverse).to(tl.float8e4nv), mask=columns < WIDTHS[part])
        values_ptr += WIDTHS[part]
    if ROOM > 0:
        tl.store(values_ptr + places, (h * inverse).to(tl.float8e4nv), mask=places < ROOM)


def rounded(
    parts: list[Tensor],
    up: Up | None = None,
    out: Rows | None = None,
    alpha: float = 1.0,
    least: Tensor | None = None,
) -> Rows:
    """alpha times matrices [rows, columns] side by side, and h beside them, with one scale a row.

    It is of the row's largest magnitude, or of `least`, float32, if that is more. Written to `out`, if that is given.
    """
    if out is None:
        room = 0 if up is None else up.unit.numel()
        out = _empty(parts[0], len(parts[0]), sum(part.shape[1] for part in parts) + room)
    (round_by_kernel if parts[0].is_cuda else round_plainly)(parts, up, out, alpha, least)
    return out


def round_by_kernel(parts: list[Tensor], up: Up | None, out: Rows, alpha: float, least: Tensor | None) -> None:
    """One launch that reads everything once: a row stays in registers."""
    parts = [part.contiguous() for part in parts]  # a weight's rows may have room beside them
    widths = tuple(part.shape[1] for part in parts)
    block = triton.next_power_of_2(max(widths))
    h, unit = up or (None, None)
    H, C, room = (0, 1, 0) if up is None else (h.shape[2], unit.shape[1], unit.numel())
    strides = (0, 0) if up is None else (h.stride(1), h.stride(0))
    _rounded_kernel[(len(parts[0]),)](
        tuple(parts), h, unit, least, *out, *strides, out.values.stride(0), widths, alpha, block,
        H, C, room, triton.next_power_of_2(max(room, 1)), LARGEST, SMALLEST,
        num_warps=min(max(8, block // 2048), 32),
    )  # fmt: skip


def round_plainly(parts: list[Tensor], up: Up | None, out: Rows, alpha: float, least: Tensor | None) -> None:
    if up is not None:
        h = up.h.float() * up.unit[:, None, : up.h.shape[2]]
        parts = [*parts, *nn.functional.pad(h, (0, up.unit.shape[1] - h.shape[2]))]
    whole = torch.cat([part.float() for part in parts], 1)
    largest = whole.abs().amax(1, keepdim=True)
    scale = ((largest if least is None else largest.clamp(min=least)) / LARGEST).clamp(min=SMALLEST)
    out.values.copy_((whole * (1 / scale)).to(out.values.dtype))
    torch.mul(scale, alpha, out=out.scale)


def _empty(like: Tensor, rows: int, columns: int) -> Rows:
    values = like.new_empty(rows, -(-columns // LINE) * LINE, dtype=torch.float8_e4m3fn)
    return Rows(values[:, :columns], like.new_empty(rows, 1, dtype=torch.float32))


def _zeros(like: Tensor, rows: int, columns: int) -> Rows:
    made = _empty(like, rows, columns)
    made.values.view(torch.uint8).zero_()  # torch fills no 8-bit floats
    made.scale.zero_()
    return made


@triton.jit
def _beside_kernel(
    B_ptr, scale_ptr, room_ptr, unit_ptr, H, C, room_stride, m: tl.constexpr, ALPHA: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, READ: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    ranks = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    largest = tl.zeros([BLOCK_H, READ], tl.float32)
    for start in range(0, m, READ):  # all of a rank, in each of its programs: to wait for others would be a launch more
        B = _in_scales(B_ptr, scale_ptr, m, H, start + tl.arange(0, READ), ranks)
        largest = tl.maximum(largest, tl.abs(B))
    unit = tl.maximum(tl.div_rn(tl.max(largest, 1), LARGEST), SMALLEST)
    if tl.program_id(1) == 0:
        tl.store(unit_ptr + ranks, unit * ALPHA, mask=ranks < C)
    outputs = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    B = _in_scales(B_ptr, scale_ptr, m, H, outputs, ranks) * tl.div_rn(1.0, unit)[:, None]
    place = room_ptr + outputs.to(tl.int64)[:, None] * room_stride + ranks[None, :]
    tl.store(place, tl.trans(B.to(tl.float8e4nv)), mask=(outputs < m)[:, None] & (ranks < C)[None, :])


@triton.jit
def _in_scales(B_ptr, scale_ptr, m, H, outputs, ranks):
    """B over the scales of the weight's rows, [ranks, outputs]."""
    inverse = tl.div_rn(1.0, tl.load(scale_ptr + outputs, mask=outputs < m, other=1.0))
    inside = (ranks < H)[:, None] & (outputs < m)[None, :]
    B = tl.load(B_ptr + ranks[:, None] * m + outputs[None, :], mask=inside, other=0.0)
    return B.to(tl.float32) * inverse[None, :]


def put_beside_by_kernel(W: Rows, B: Tensor, alpha: float, unit: Tensor) -> None:
    """`put_beside`, in one launch."""
    (H, m), C = B.shape, len(unit)
    _beside_kernel[(triton.cdiv(C, 8), triton.cdiv(m, 1024))](
        B, W.scale, W.values[:, -C:], unit, H, C, W.values.stride(0), m, alpha, 8, 1024, 2048, LARGEST, SMALLEST,
        num_warps=16,
    )  # fmt: skip


def put_beside(W: Rows, B: Tensor, alpha: float, unit: Tensor) -> None:
    """Writes B [H, m] over `unit` into the last C columns of W, and alpha · `unit`, what h is multiplied by: [C]."""
    if B.is_cuda:
        return put_beside_by_kernel(W, B, alpha, unit)
    C = len(unit)
    in_scales = nn.functional.pad(B.T.float() * (1 / W.scale), (0, C - len(B)))
    largest = (in_scales.abs().amax(0) / LARGEST).clamp(min=SMALLEST)
    W.values[:, -C:] = (in_scales * (1 / largest)).to(W.values.dtype)
    unit.copy_(largest * alpha)


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
    """The weights of linear maps that read the same input, rounded."""

    source: tuple  # where they were read, and in which version
    room: int  # C
    by_output: list[Rows]  # of map g, [W, zeros, room for its B]: [m, n + (g + 1)·C]
    # Wᵀ of all side by side, and below it room for each B in its map's columns: [n + G·C, Σm]. None until a gradient of
    # the input is asked for.
    by_input: Rows | None

    def beside(self, Bs: list[Tensor], alpha: float, units: Tensor | None = None) -> tuple[Tensor, list[Work]]:
        """The units, [G, C], and works that set one and round alpha · B [H, m] beside the weight, for each map."""
        if units is None:
            units = Bs[0].new_empty(len(Bs), self.room, dtype=torch.float32)
        of_each = zip(self.by_output, Bs, units, strict=True)
        return units, [partial(put_beside, W, B, alpha, unit) for W, B, unit in of_each]

    def outputs(self, x: Tensor, biases: list[Tensor | None], up: Up | None = None) -> list[Tensor]:
        """x Wᵀ, the bias and h B of each map, for x [T, n]: [T, m].

        Not as columns of one product: Liger's kernels copy what is not contiguous.
        """
        values, scale = rounded([x], up)
        return [
            product(Rows(values[:, : W.values.shape[1]], scale), W, x.dtype, bias)
            for W, bias in zip(self.by_output, biases, strict=True)
        ]

    def gradients(self, dys: list[Tensor], Bs: list[Tensor], alpha: float, puts: bool = True) -> tuple[Tensor, Tensor]:
        """Σ dy W over the maps, [T, n], and alpha · dy Bᵀ of each, [G, T, H], of dy [T, m] and B [H, m].

        Views of one product of Σm terms. Puts B below Wᵀ, unless it is there.
        """
        dy, *_ = side_by_side(dys[0], [partial(rounded, dys), *(self.below(Bs, alpha) if puts else [])])
        dx, dh = product(dy, self.by_input, dys[0].dtype).tensor_split([-len(Bs) * self.room], 1)
        return dx, dh.unflatten(1, (len(Bs), self.room)).transpose(0, 1)[..., : len(Bs[0])]

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W of one map that has no B, [T, n], of dy [T, m]."""
        return product(rounded([dy]), self.by_input, dy.dtype)

    def below(self, Bs: list[Tensor], alpha: float) -> list[Work]:
        """Works that round alpha · B [H, m] below the weight, for each map.

        Not done when y is made: another adapter's B of this size may have been here since.
        """
        values, scale = self.by_input
        row, column, works = len(values) - len(Bs) * self.room, 0, []
        for B in Bs:
            H, m = B.shape
            out = Rows(values[row : row + H, column : column + m], scale[row : row + H])
            works.append(partial(rounded, [B], None, out, alpha))
            row, column = row + self.room, column + m
        return works


Kept = dict[tuple[int, ...], Frozen]  # by the ids of the maps, and the columns of room beside them


def frozen(
    linears: list[nn.Linear], kept: Kept, backward: bool, H: int = 0, instead: str = "the fused backend"
) -> Frozen | None:
    """Rounded weights of maps that read the same input, with room for their B [H, m]; None, and a log line, if there
    cannot be.

    They are made when a weight is new or has changed. `kept` is where they are looked up and put.
    """
    if reason := _obstacle(linears):
        say_once("fp8", reason, instead)
        return None
    weights = [linear.weight.detach() for linear in linears]
    source = tuple((W.device, W.data_ptr(), W._version) for W in weights)
    room, n = room_for(H), weights[0].shape[1]
    place = (*map(id, linears), room)
    found = kept.get(place)
    with torch.inference_mode(False):  # they outlive it, and room is written to
        if found is None or found.source != source:
            found = Frozen(source, room, [_zeros(W, len(W), n + (g + 1) * room) for g, W in enumerate(weights)], None)
            least = _least(weights) if room else None
            for (values, scale), W in zip(found.by_output, weights, strict=True):
                rounded([W], out=Rows(values[:, :n], scale), least=least)
        if backward and found.by_input is None:
            by_input = _zeros(weights[0], n + len(weights) * room, sum(map(len, weights)))
            rounded([W.T for W in weights], out=Rows(by_input.values[:n], by_input.scale[:n]))
            found = found._replace(by_input=by_input)
    if not is_captured(weights[0]):
        kept[place] = found
    return found


def room_for(H: int) -> int:
    """C, the columns that B [H, m] takes beside a weight."""
    return -(-H // MULTIPLE) * MULTIPLE


def _least(weights: list[Tensor]) -> Tensor:
    """What a row's largest magnitude counts for at least: [] float32. A row that is not finite loses itself alone."""
    largest = torch.cat([W.abs().amax(1) for W in weights]).float()
    return (LEAST_SHARE * largest.nan_to_num(0.0, 0.0).max()).clamp(min=LEAST)


def _obstacle(linears: list[nn.Linear]) -> str | None:
    device = linears[0].weight.device
    for size in (linears[0].in_features, *(linear.out_features for linear in linears)):
        if size % MULTIPLE:
            return f"a layer with a side of {size}, no multiple of {MULTIPLE}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"on {torch.cuda.get_device_name(device)}, which has no 8-bit products"
    return None


class Alone(torch.autograd.Function):
    """(x [T, n], bias or None, rounded weight of one frozen map) -> x Wᵀ + bias [T, m]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Frozen) -> Tensor:
        ctx.weight = weight
        return weight.outputs(x, [bias])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.weight.input_gradient(dy), None, None
