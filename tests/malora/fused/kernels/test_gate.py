"""The gate kernels alone.

Covered are split sums that they add, missing gradients, and padding that they leave untouched.
"""

from dataclasses import replace

import pytest
import torch

from malora.fused.kernels import down_forward, down_tiling, dropout, gate
from malora.fused.kernels.gate import GateLayout
from tests.malora.fused.hopper import run_compile_script

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPES = ("cuda", [torch.bfloat16]) if ON_GPU else ("cpu", [torch.float64, torch.float16])
G, T = 2, 37  # projections, and tokens of two tiles


def make_layout(N: int, r: int, D: int, z_step: int, has_p: bool) -> GateLayout:
    """Return the layout of G projections.

    Both z and logits are padded to multiples of 8 columns.
    """
    z, logits = (-(-size // 8) * 8 for size in (N * D if z_step else D, N))
    return GateLayout(N, 2, r, D, z_step, z_group=z, l_group=logits, logits_at=G * z, has_p=has_p, scaling=2.0)


LAYOUTS = {
    "malora": make_layout(8, 12, 32, 0, True),
    "malora-small": make_layout(8, 8, 22, 0, True),  # its z is padded
    "malora-unshared-s": make_layout(8, 12, 4, 4, True),
    "molora": make_layout(8, 8, 8, 8, False),
    "odd malora": make_layout(3, 5, 7, 0, True),
    "odd molora": make_layout(3, 5, 5, 5, False),
    "renormalised malora": replace(make_layout(3, 5, 7, 0, True), renormalize=True),
    "renormalised molora": replace(make_layout(3, 5, 5, 5, False), renormalize=True),
}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def used_columns(layout: GateLayout, padded_z: bool = False) -> torch.Tensor:
    """Return the columns of down_out that are not padding.

    With `padded_z`, return also the padding of a shared z.
    """
    z = layout.N * layout.D if layout.z_step else layout.D
    if padded_z and not layout.z_step:
        z = layout.z_group
    starts = [(g * layout.z_group, z) for g in range(G)]
    starts += [(layout.logits_at + g * layout.l_group, layout.N) for g in range(G)]
    return torch.cat([torch.arange(start, start + size) for start, size in starts])


def make_tensors(layout: GateLayout, dtype: torch.dtype, count: int = 3):
    """Return `count` splits of down_out as a column slice of a wider tensor, P and h."""
    torch.manual_seed(0)
    width = layout.logits_at + G * layout.l_group
    splits = torch.zeros(count, T, width + 16, dtype=torch.promote_types(dtype, torch.float32))
    used = used_columns(layout)
    splits[..., used] = torch.randn(count, T, len(used), dtype=splits.dtype)
    P = torch.randn(G, layout.N, layout.r, -(-layout.D // 8) * 8, dtype=dtype) if layout.has_p else None
    h = torch.zeros(G, T, -(-layout.N * layout.r // 8) * 8, dtype=dtype)
    return [None if t is None else t.to(DEVICE) for t in (splits[..., :width], P, h)]


@all_dtypes
@all_layouts
def test_splits_are_gated_as_their_sum(layout, dtype):
    splits, P, h = make_tensors(layout, dtype)
    down_out = ((splits[0] + splits[1]) + splits[2]).to(dtype)
    expected = gate.gate(down_out, P, h, layout)
    wider = torch.full((T, splits.stride(1)), torch.nan, dtype=dtype, device=DEVICE)
    got_down_out, got_h = wider[:, : down_out.shape[1]], torch.zeros_like(h)
    got = gate.gate(got_down_out, P, got_h, layout, splits)
    written = used_columns(layout)
    assert torch.equal(got_down_out[:, written], down_out[:, written]) and down_out.abs().sum() > 0
    assert wider.isnan().sum() == wider.numel() - T * len(written)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_h, h)


@all_dtypes
@all_layouts
def test_no_gradient_of_the_probabilities_equals_zeros(layout, dtype):
    splits, P, h = make_tensors(layout, dtype)
    down_out, dh = splits.sum(0).to(dtype), torch.randn(h.shape).to(h)
    nonzero = torch.randn(G, T, layout.N).to(splits)
    found = []
    for dprobability in (None, torch.zeros_like(nonzero), nonzero):
        d_down_out = torch.zeros_like(down_out)
        gate.gate_backward(down_out, P, dh, dprobability, d_down_out, layout)
        found.append(d_down_out)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@all_dtypes
@all_layouts
def test_gradients_may_be_written_to_another_row_stride(layout, dtype):
    """Check that gradients are equal, and that nothing else is written.

    All columns that a matmul reads are written if the number of experts is a multiple of eight.
    """
    splits, P, h = make_tensors(layout, dtype)
    down_out, dh = splits.sum(0).to(dtype), torch.randn(h.shape).to(h)
    expected = torch.zeros_like(down_out)
    gate.gate_backward(down_out, P, dh, None, expected, layout)
    wider = torch.full((T, down_out.shape[1] + 16), torch.nan, dtype=dtype, device=DEVICE)
    got = wider[:, : down_out.shape[1]]
    assert got.stride() != down_out.stride()
    gate.gate_backward(down_out, P, dh, None, got, layout)
    written = used_columns(layout, padded_z=True)
    assert torch.equal(got[:, written], expected[:, written]) and expected.abs().sum() > 0
    assert wider.isnan().sum() == wider.numel() - T * len(written)
    assert len(written) == down_out.shape[1] or layout.N % 8


@all_layouts
def test_outputs_and_gradients_equal_those_of_autograd(layout):
    dtype = torch.float32 if ON_GPU else torch.float64
    splits, P, h = make_tensors(layout, dtype)
    down_out, dh = splits.sum(0).requires_grad_(), torch.randn(h.shape).to(h)
    dprobability = torch.randn(G, T, layout.N).to(splits)
    z = down_out[:, : layout.logits_at].unflatten(1, (G, -1)).transpose(0, 1)
    logits = down_out[:, layout.logits_at :].unflatten(1, (G, -1)).transpose(0, 1)[..., : layout.N]
    probability = logits.softmax(-1)
    chosen = torch.zeros_like(probability).scatter(-1, probability.topk(2).indices, 1.0)
    size = layout.N * layout.D if layout.z_step else layout.D
    expert_z = z[..., :size].reshape(G, T, -1, layout.D).expand(G, T, layout.N, layout.D)
    expert_out = torch.einsum("gtnd,gnrd->gtnr", expert_z, P[..., : layout.D]) if layout.has_p else expert_z
    gates = probability * chosen
    if layout.renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    expected_h = (expert_out * (gates * layout.scaling)[..., None]).flatten(2)
    H = expected_h.shape[2]
    ((expected_h * dh[..., :H]).sum() + (probability * dprobability).sum()).backward()
    d_down_out = torch.zeros_like(down_out)
    with torch.no_grad():
        torch.testing.assert_close(gate.gate(down_out, P, h, layout), probability)
        torch.testing.assert_close(h[..., :H], expected_h)
        gate.gate_backward(down_out, P, dh, dprobability, d_down_out, layout)
    torch.testing.assert_close(d_down_out, down_out.grad)


def test_splits_of_a_down_projection_add_up_to_it(monkeypatch):
    monkeypatch.setattr(down_tiling, "MIN_BLOCKS_PER_SPLIT", 1)
    n, Z, L, p = 200, 24, 8, 0.3
    torch.manual_seed(0)
    x, weights = (torch.randn(rows, n).to(DEVICE, DTYPES[0]) for rows in (T, Z + L))
    bits = dropout.draw_mask(T, n, torch.tensor([5], device=DEVICE), p)
    down_out, splits = down_forward.dropout_matmul_split_k(x, bits, weights, Z, p)
    assert splits.shape == (4, T, Z + L) and splits.dtype == torch.promote_types(DTYPES[0], torch.float32)
    assert down_out.shape == (T, Z + L) and down_out.stride() == splits.stride()[1:]
    masked, weights_acc = dropout.apply_dropout(x, bits, p).to(splits), weights.to(splits)
    expected = torch.cat([masked @ weights_acc[:Z].T, x.to(splits) @ weights_acc[Z:].T], 1)
    close = {"rtol": 1e-2, "atol": 0.1} if ON_GPU else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(splits.sum(0), expected, **close)
    assert torch.equal(down_forward.dropout_matmul(x, bits, weights, Z, p), splits.sum(0).to(x.dtype))
    monkeypatch.setattr(down_tiling, "MIN_BLOCKS_PER_SPLIT", 99)
    down_out, splits = down_forward.dropout_matmul_split_k(x, bits, weights, Z, p)
    assert splits is None
    torch.testing.assert_close(down_out.to(expected), expected, **close)


COMPILE = """
import torch
from malora.fused.kernels import gate
from malora.fused.kernels.gate import GateLayout
from tests.malora.fused.hopper import compile_for_hopper
types = dict.fromkeys(("splits_ptr", "probability_ptr", "dprobability_ptr"), "*fp32")
for N, r, D, step, has_p in (8, 12, 32, 0, True), (8, 12, 4, 4, True), (2, 8, 128, 128, True), (8, 8, 8, 8, False):
    z = N * D if step else D
    layout = GateLayout(N, 2, r, D, step, z, 8, 3 * z, has_p, 2.0)
    missing = {} if has_p else {"p_ptr": None, "gated_dh_ptr": None}
    constants = layout.constants(torch.bfloat16) | missing
    for splits in 0, 16:
        given = {"SPLITS": splits} | ({} if splits else {"splits_ptr": None})
        stages = gate.forward_stages(layout, splits)
        print(compile_for_hopper(gate._gate_kernel, constants | given, types, num_stages=stages), end="\\f")
    constants = layout.constants(torch.bfloat16, gate.backward_step_columns(layout)) | missing
    for given in {"HAS_DPROBABILITY": False, "dprobability_ptr": None}, {"HAS_DPROBABILITY": True}:
        print(compile_for_hopper(gate._gate_backward_kernel, constants | given, types), end="\\f")
"""


def test_compiled_for_hopper_matmuls_are_synchronous_and_missing_tensors_are_not_read(tmp_path):
    """Check the matmuls and the loads of the kernels that are compiled for Hopper.

    Tiles of 32 tokens are too small for Hopper's asynchronous matmuls, so that the kernels need no wait.
    """
    codes = run_compile_script(COMPILE, tmp_path)
    assert len(codes) == 16

    def loads(code: str) -> int:
        return code.count("tt.load") + code.count("async_copy_global_to_local")

    for index, code in enumerate(codes):
        assert "warp_group_dot" not in code
        assert ("tt.dot" in code) == (index < 12)  # the last layout has no P
    for without, having in zip(codes[::2], codes[1::2], strict=True):
        assert loads(having) > loads(without)
