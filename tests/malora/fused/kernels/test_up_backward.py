"""One kernel for the gradients of an up side gives what two products give; on a GPU in bfloat16, at sizes in use."""

import pytest
import torch

from malora.fused.kernels import tiling, up_backward
from tests.malora.fused.hopper import printed

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE, CLOSE = ("cuda", torch.bfloat16, 5e-3) if ON_GPU else ("cpu", torch.float64, 1e-12)
# tokens, outputs, ranks: odd ones, more blocks of tokens than of outputs and fewer; and those of a 7B model
ODD = [(1, 16, 8), (200, 80, 24), (70, 272, 40), (129, 128, 16), (300, 272, 80), (90, 144, 128)]
USED = [(4096, 4096, 96), (4096, 11008, 64), (4096, 11008, 96), (4096, 4096, 128), (1000, 4096, 96), (8200, 1536, 64)]


@pytest.mark.parametrize("narrower", [(), (0,), (0, 16, 0), (16, 16)])
@pytest.mark.parametrize("T, m, H", ODD + USED if ON_GPU else ODD)
def test_equals_two_products(T, m, H, narrower):
    """Of one, and of siblings of one width and of several."""
    torch.manual_seed(0)
    widths = [m, *(max(m - less, 16) for less in narrower)]
    dys, Bs = ([torch.randn(rows, width, device=DEVICE).to(DTYPE) for width in widths] for rows in (T, H))
    # Rows that lie in wider ones, which begin at multiples of 16.
    rooms = torch.full((2, len(widths), T, -(-H // 16) * 16 + 16), torch.nan, dtype=DTYPE, device=DEVICE)
    h, dh = rooms[..., :H]
    h.copy_(torch.randn(h.shape))
    assert all(up_backward.is_profitable(dy, h_g, H) for dy, h_g in zip(dys, h, strict=True))
    dBs = up_backward.gradients(dys, h, Bs, 2.0, dh)
    wide = torch.float32 if ON_GPU else torch.float64
    assert len(dBs) == len(dys) and rooms[..., H:].isnan().all()
    for g, (dy, B, dB) in enumerate(zip(dys, Bs, dBs, strict=True)):
        assert dB.dtype == wide
        for got, expected in (dh[g], 2 * dy.to(wide) @ B.to(wide).T), (dB, 2 * h[g].to(wide).T @ dy.to(wide)):
            assert (got.to(wide) - expected).norm() <= CLOSE * expected.norm()


def test_rows_that_do_not_begin_at_multiples_are_left_to_two_products():
    dy, h = torch.randn(20, 32), torch.randn(20, 16)
    assert (
        up_backward.is_profitable(dy, h, 16)
        and not up_backward.is_profitable(dy, h, 136)
        and not up_backward.is_profitable(dy[:0], h[:0], 16)
    )
    assert not up_backward.is_profitable(torch.randn(20, 24), h, 16) and not up_backward.is_profitable(
        dy, torch.randn(20, 24), 16
    )


def test_loads_have_the_stages_that_fit(monkeypatch):
    device, dy = torch.device("cpu"), torch.randn(20, 32)
    assert [up_backward._stages(H, device) for H in (16, 64, 96, 128)] == [4, 4, 4, 4]
    monkeypatch.setattr(tiling, "shared_memory_bytes", lambda device: 99 << 10)  # of a GPU at home
    assert [up_backward._stages(H, device) for H in (16, 64, 96, 128)] == [4, 3, 2, 2] and up_backward.is_profitable(
        dy, dy, 128
    )
    monkeypatch.setattr(tiling, "shared_memory_bytes", lambda device: 64 << 10)
    assert up_backward.is_profitable(dy, dy, 64) and not up_backward.is_profitable(dy, dy, 96)


COMPILE = """
import torch
import triton.language as tl
from malora.backends import up
from malora.backends.blocks import LEAST_RIGHT, blocks_of
from tests.malora.hopper import compiled
for H in 8, 64, 96, 128:
    ranks = blocks_of(H, LEAST_RIGHT)
    constants = {"T_UP": 4096, "M_UP": 4096, "ALPHA": 1.0, "EVEN_T": True, "EVEN_M": True, "H": H,
                 "PAD_H": ranks["first"], "REST": ranks["rest"], "PAD_REST": ranks["pad_rest"], "WIDE": tl.float32}
    tuned = dict(up.TUNED, num_stages=up._stages(H, torch.device("cpu")))
    options = {name: tuned.pop(name) for name in ("num_warps", "num_stages")}
    types = {"db_ptr": "*fp32", **dict.fromkeys(("dy_ptrs", "h_ptrs", "b_ptrs", "dh_ptrs"), ("*bf16",) * 3)}
    code = compiled(up._up_kernel, constants | tuned, types, ("T", "m"), **options)
    print(code, end="\\f")
"""


def test_what_a_product_reads_is_copied_ahead(tmp_path):
    """And fits into an H100's shared memory. Nothing goes through registers, which a product might still read."""
    codes = printed(COMPILE, tmp_path)
    assert len(codes) == 4
    for code in codes:
        assert "async_copy_global_to_local" in code and "local_store" not in code
        assert not [line for line in code.splitlines() if "local_alloc %" in line]


@pytest.mark.parametrize("size, blocks", [(1, 1), (128, 1), (129, 2), (15 * 128, 15), (17 * 128, 18), (33 * 128, 36)])
def test_sums_are_of_few_different_lengths(size, blocks):
    assert up_backward._up(size, 128) == 128 * blocks


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no races")
@pytest.mark.parametrize("T, m, H", USED)
def test_is_the_same_every_time(T, m, H):
    torch.manual_seed(0)
    dys, h, Bs = (torch.randn(2, *size, device=DEVICE).to(DTYPE) for size in ((T, m), (T, H), (H, m)))

    def scaled_matmul():
        dh = torch.empty_like(h)
        return torch.cat([t.flatten() for t in (*up_backward.gradients([*dys], h, [*Bs], 2.0, dh), dh)])

    first = scaled_matmul()
    differ = torch.stack([(scaled_matmul() != first).any() for _ in range(1000)]).sum().item()
    assert not differ, f"{differ} of 1000 differ"
