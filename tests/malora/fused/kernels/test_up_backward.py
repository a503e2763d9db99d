"""The backward kernel of the up projections equals two matmuls per projection.

In float64 through Triton's interpreter; on a GPU in bfloat16, at sizes in use.
"""

import pytest
import torch

from malora.fused.kernels import tiling, up_backward
from tests.malora.fused.hopper import run_compile_script

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 5e-3) if ON_GPU else ("cpu", torch.float64, 1e-12)
# Tokens, out features, ranks. Unusual sizes, with more tiles of tokens than of out features and with fewer.
ODD = [(1, 16, 8), (200, 80, 24), (70, 272, 40), (129, 128, 16), (300, 272, 80), (90, 144, 128)]
USED = [(4096, 4096, 96), (4096, 11008, 64), (4096, 11008, 96), (4096, 4096, 128), (1000, 4096, 96), (8200, 1536, 64)]


@pytest.mark.parametrize("narrower", [(), (0,), (0, 16, 0), (16, 16)])
@pytest.mark.parametrize("T, m, H", ODD + USED if ON_GPU else ODD)
def test_gradients_equal_two_matmuls(T, m, H, narrower):
    """For one projection, and for a group of one width and of several."""
    torch.manual_seed(0)
    widths = [m, *(max(m - less, 16) for less in narrower)]
    dys, Bs = ([torch.randn(rows, width, device=DEVICE).to(DTYPE) for width in widths] for rows in (T, H))
    # h and dh are column slices of wider matrices, whose row stride is a multiple of 16.
    wider = torch.full((2, len(widths), T, -(-H // 16) * 16 + 16), torch.nan, dtype=DTYPE, device=DEVICE)
    h, dh = wider[..., :H]
    h.copy_(torch.randn(h.shape))
    assert all(up_backward.is_profitable(dy, h_g, H) for dy, h_g in zip(dys, h, strict=True))
    dBs = up_backward.up_proj_backward(dys, h, Bs, 2.0, dh)
    acc = torch.float32 if ON_GPU else torch.float64
    assert len(dBs) == len(dys) and wider[..., H:].isnan().all()
    for g, (dy, B, dB) in enumerate(zip(dys, Bs, dBs, strict=True)):
        assert dB.dtype == acc
        for got, expected in (dh[g], 2 * dy.to(acc) @ B.to(acc).T), (dB, 2 * h[g].to(acc).T @ dy.to(acc)):
            assert (got.to(acc) - expected).norm() <= TOLERANCE * expected.norm()


def test_unaligned_rows_many_ranks_and_no_tokens_are_left_to_two_matmuls():
    dy, h = torch.randn(20, 32), torch.randn(20, 16)
    assert up_backward.is_profitable(dy, h, 16)
    assert not up_backward.is_profitable(dy, h, 136)
    assert not up_backward.is_profitable(dy[:0], h[:0], 16)
    assert not up_backward.is_profitable(torch.randn(20, 24), h, 16)
    assert not up_backward.is_profitable(dy, torch.randn(20, 24), 16)


def test_as_many_tiles_are_prefetched_as_fit(monkeypatch):
    device, dy = torch.device("cpu"), torch.randn(20, 32)

    def stages():
        return [up_backward._stages(H, device) for H in (16, 64, 96, 128)]

    assert stages() == [4, 4, 4, 4]
    monkeypatch.setattr(tiling, "shared_memory_bytes", lambda device: 99 << 10)  # of a consumer GPU
    assert stages() == [4, 3, 2, 2] and up_backward.is_profitable(dy, dy, 128)
    monkeypatch.setattr(tiling, "shared_memory_bytes", lambda device: 64 << 10)
    assert up_backward.is_profitable(dy, dy, 64) and not up_backward.is_profitable(dy, dy, 96)


COMPILE = """
import torch
import triton.language as tl
from malora.fused.kernels import up_backward
from malora.fused.kernels.tiling import MIN_RIGHT_COLUMNS, split_tile
from tests.malora.fused.hopper import compile_for_hopper
for H in 8, 64, 96, 128:
    ranks = split_tile(H, MIN_RIGHT_COLUMNS)
    constants = {"T_PADDED": 4096, "M_PADDED": 4096, "ALPHA": 1.0, "EVEN_T": True, "EVEN_M": True, "H": H,
                 "PAD_HEAD": ranks.head, "TAIL": ranks.tail, "PAD_TAIL": ranks.pad_tail, "ACC": tl.float32}
    launch = dict(up_backward.LAUNCH, num_stages=up_backward._stages(H, torch.device("cpu")))
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    types = {"db_ptr": "*fp32", **dict.fromkeys(("dy_ptrs", "h_ptrs", "b_ptrs", "dh_ptrs"), ("*bf16",) * 3)}
    kernel = up_backward._up_proj_backward_kernel
    print(compile_for_hopper(kernel, constants | launch, types, ("T", "m"), **options), end="\\f")
"""


def test_operands_are_prefetched_into_shared_memory(tmp_path):
    """They do not go through registers, which an unfinished matmul might still read."""
    codes = run_compile_script(COMPILE, tmp_path)
    assert len(codes) == 4
    for code in codes:
        assert "async_copy_global_to_local" in code and "local_store" not in code
        assert not [line for line in code.splitlines() if "local_alloc %" in line]


@pytest.mark.parametrize("size, tiles", [(1, 1), (128, 1), (129, 2), (15 * 128, 15), (17 * 128, 18), (33 * 128, 36)])
def test_loops_over_tokens_have_few_different_lengths(size, tiles):
    assert up_backward._padded_tokens(size, 128) == 128 * tiles


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no races")
@pytest.mark.parametrize("T, m, H", USED)
def test_gradients_are_the_same_every_time(T, m, H):
    torch.manual_seed(0)
    dys, h, Bs = (torch.randn(2, *size, device=DEVICE).to(DTYPE) for size in ((T, m), (T, H), (H, m)))

    def gradients():
        dh = torch.empty_like(h)
        return torch.cat([t.flatten() for t in (*up_backward.up_proj_backward([*dys], h, [*Bs], 2.0, dh), dh)])

    first = gradients()
    differ = torch.stack([(gradients() != first).any() for _ in range(1000)]).sum().item()
    assert not differ, f"{differ} of 1000 differ"
