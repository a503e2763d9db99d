"""The gate's kernels by themselves: parts that they add up, gradients that are not there, rows and gaps in memory."""

import pytest
import torch

from malora.fused.kernels import down_forward, down_tiling, dropout, gate
from malora.fused.kernels.gate import GateLayout
from tests.malora.fused.hopper import printed

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPES = ("cuda", [torch.bfloat16]) if ON_GPU else ("cpu", [torch.float64, torch.float16])
G, T = 2, 37  # siblings, and tokens of two blocks


def gate_shape(N: int, r: int, D: int, z_step: int, has_p: bool) -> GateLayout:
    """As of a stack of `G` siblings: rounded up to eights."""
    z, logits = (-(-size // 8) * 8 for size in (N * D if z_step else D, N))
    return GateLayout(N, 2, r, D, z_step, z_group=z, l_group=logits, logits_at=G * z, has_p=has_p, scaling=2.0)


SHAPES = {
    "malora": gate_shape(8, 12, 32, 0, True),
    "malora-small": gate_shape(8, 8, 22, 0, True),  # its z is padded
    "malora-unshared-s": gate_shape(8, 12, 4, 4, True),
    "molora": gate_shape(8, 8, 8, 8, False),
    "odd malora": gate_shape(3, 5, 7, 0, True),
    "odd molora": gate_shape(3, 5, 5, 5, False),
}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def columns(shape: GateLayout, padded_z: bool = False) -> torch.Tensor:
    """Which columns of zl, or of its gradient, are no padding; or, where experts share z, what pads it too."""
    z = shape.z_group if padded_z and not shape.z_step else shape.N * shape.D if shape.z_step else shape.D
    starts = [(g * shape.z_group, z) for g in range(G)]
    starts += [(shape.logits_at + g * shape.l_group, shape.N) for g in range(G)]
    return torch.cat([torch.arange(start, start + size) for start, size in starts])


def tensors(shape: GateLayout, dtype: torch.dtype, parts: int = 3):
    """Parts of zl, with rows wider than what is in them; P; h."""
    torch.manual_seed(0)
    width = shape.logits_at + G * shape.l_group
    found = torch.zeros(parts, T, width + 16, dtype=torch.promote_types(dtype, torch.float32))
    found[..., columns(shape)] = torch.randn(parts, T, len(columns(shape)), dtype=found.dtype)
    P = torch.randn(G, shape.N, shape.r, -(-shape.D // 8) * 8, dtype=dtype) if shape.has_p else None
    h = torch.zeros(G, T, -(-shape.N * shape.r // 8) * 8, dtype=dtype)
    return [None if t is None else t.to(DEVICE) for t in (found[..., :width], P, h)]


@all_dtypes
@all_shapes
def test_parts_are_gated_as_their_sum(shape, dtype):
    parts, P, h = tensors(shape, dtype)
    zl = ((parts[0] + parts[1]) + parts[2]).to(dtype)
    expected = gate.gate(zl, P, h, shape)
    rows = torch.full((T, parts.stride(1)), torch.nan, dtype=dtype, device=DEVICE)
    got_zl, got_h = rows[:, : zl.shape[1]], torch.zeros_like(h)
    got = gate.gate(got_zl, P, got_h, shape, parts)
    written = columns(shape)
    assert torch.equal(got_zl[:, written], zl[:, written]) and zl.abs().sum() > 0
    assert rows.isnan().sum() == rows.numel() - T * len(written)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_h, h)


@all_dtypes
@all_shapes
def test_no_gradient_of_the_probabilities_is_one_of_zeros(shape, dtype):
    parts, P, h = tensors(shape, dtype)
    zl, dh = parts.sum(0).to(dtype), torch.randn(h.shape).to(h)
    some = torch.randn(G, T, shape.N).to(parts)
    found = []
    for dprobability in (None, torch.zeros_like(some), some):
        dzl = torch.zeros_like(zl)
        gate.gate_backward(zl, P, dh, dprobability, dzl, shape)
        found.append(dzl)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@all_dtypes
@all_shapes
def test_gradients_may_lie_in_rows_of_their_own(shape, dtype):
    """And are written everywhere that a product reads, where numbers of experts are multiples of eight."""
    parts, P, h = tensors(shape, dtype)
    zl, dh = parts.sum(0).to(dtype), torch.randn(h.shape).to(h)
    expected = torch.zeros_like(zl)
    gate.gate_backward(zl, P, dh, None, expected, shape)
    rows = torch.full((T, zl.shape[1] + 16), torch.nan, dtype=dtype, device=DEVICE)
    got = rows[:, : zl.shape[1]]
    assert got.stride() != zl.stride()
    gate.gate_backward(zl, P, dh, None, got, shape)
    written = columns(shape, padded_z=True)
    assert torch.equal(got[:, written], expected[:, written]) and expected.abs().sum() > 0
    assert rows.isnan().sum() == rows.numel() - T * len(written)
    assert len(written) == zl.shape[1] or shape.N % 8


@all_shapes
def test_gradients_are_those_of_autograd(shape):
    dtype = torch.float32 if ON_GPU else torch.float64
    parts, P, h = tensors(shape, dtype)
    zl, dh = parts.sum(0).requires_grad_(), torch.randn(h.shape).to(h)
    dprobability = torch.randn(G, T, shape.N).to(parts)
    z = zl[:, : shape.logits_at].unflatten(1, (G, -1)).transpose(0, 1)
    logits = zl[:, shape.logits_at :].unflatten(1, (G, -1)).transpose(0, 1)[..., : shape.N]
    probability = logits.softmax(-1)
    chosen = torch.zeros_like(probability).scatter(-1, probability.topk(2).indices, 1.0)
    size = shape.N * shape.D if shape.z_step else shape.D
    each = z[..., :size].reshape(G, T, -1, shape.D).expand(G, T, shape.N, shape.D)
    u = torch.einsum("gtnd,gnrd->gtnr", each, P[..., : shape.D]) if shape.has_p else each
    expected_h = (u * (probability * chosen * shape.scaling)[..., None]).flatten(2)
    H = expected_h.shape[2]
    ((expected_h * dh[..., :H]).sum() + (probability * dprobability).sum()).backward()
    dzl = torch.zeros_like(zl)
    with torch.no_grad():
        torch.testing.assert_close(gate.gate(zl, P, h, shape), probability)
        torch.testing.assert_close(h[..., :H], expected_h)
        gate.gate_backward(zl, P, dh, dprobability, dzl, shape)
    torch.testing.assert_close(dzl, zl.grad)


def test_parts_of_a_down_side_are_its_sum(monkeypatch):
    monkeypatch.setattr(down_tiling, "MIN_BLOCKS_PER_SPLIT", 1)
    n, Z, L, p = 200, 24, 8, 0.3
    torch.manual_seed(0)
    x, weights = (torch.randn(rows, n).to(DEVICE, DTYPES[0]) for rows in (T, Z + L))
    bits = dropout.mask(T, n, torch.tensor([5], device=DEVICE), p)
    zl, parts = down_forward.dropout_matmul_split_k(x, bits, weights, Z, p)
    assert parts.shape == (4, T, Z + L) and parts.dtype == torch.promote_types(DTYPES[0], torch.float32)
    assert zl.shape == (T, Z + L) and zl.stride() == parts.stride()[1:]
    left, wide = dropout.apply_dropout(x, bits, p).to(parts), weights.to(parts)
    whole = torch.cat([left @ wide[:Z].T, x.to(parts) @ wide[Z:].T], 1)
    close = {"rtol": 1e-2, "atol": 0.1} if ON_GPU else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(parts.sum(0), whole, **close)
    assert torch.equal(down_forward.down(x, bits, weights, Z, p), parts.sum(0).to(x.dtype))
    monkeypatch.setattr(down_tiling, "MIN_BLOCKS_PER_SPLIT", 99)
    zl, parts = down_forward.dropout_matmul_split_k(x, bits, weights, Z, p)
    assert parts is None
    torch.testing.assert_close(zl.to(whole), whole, **close)


COMPILE = """
import torch
from malora.backends import kernels
from malora.backends.kernels import GateShape
from tests.malora.hopper import compiled
types = dict.fromkeys(("parts_ptr", "probability_ptr", "dprobability_ptr"), "*fp32")
for N, r, D, step, has_p in (8, 12, 32, 0, True), (8, 12, 4, 4, True), (2, 8, 128, 128, True), (8, 8, 8, 8, False):
    z = N * D if step else D
    shape = GateShape(N, 2, r, D, step, z, 8, 3 * z, has_p, 2.0)
    constants = shape.constants(torch.bfloat16) | ({} if has_p else {"p_ptr": None, "e_ptr": None})
    for parts in 0, 16:
        there = {"PARTS": parts} | ({} if parts else {"parts_ptr": None})
        code = compiled(kernels._gate_kernel, constants | there, types, num_stages=kernels.stages(shape, parts))
        print(code, end="\\f")
    constants |= shape.constants(torch.bfloat16, r if has_p else kernels.COLUMNS)
    for there in {"HAS_DPROBABILITY": False, "dprobability_ptr": None}, {"HAS_DPROBABILITY": True}:
        print(compiled(kernels._gate_backward_kernel, constants | there, types), end="\\f")
"""


def test_compiled_for_hopper_no_product_runs_on(tmp_path):
    """Blocks of 32 tokens are too few for the products that do; parts and gradients that are not there are not read."""
    codes = printed(COMPILE, tmp_path)
    assert len(codes) == 16

    def loads(code: str) -> int:
        return code.count("tt.load") + code.count("async_copy_global_to_local")

    for place, code in enumerate(codes):
        assert "warp_group_dot" not in code
        assert ("tt.dot" in code) == (place < 12)  # with P
    for without, having in zip(codes[::2], codes[1::2], strict=True):
        assert loads(having) > loads(without)
