"""The products with dropout inside equal plain products of masked tensors; on a GPU in bfloat16, at sizes in use."""

import pytest
import torch

from malora.fused.kernels import down_backward, down_forward, down_tiling, dropout, tiling
from tests.malora.fused.hopper import printed, products_left_running

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE, CLOSE = ("cuda", torch.bfloat16, 5e-3) if ON_GPU else ("cpu", torch.float64, 1e-12)
# tokens, inputs, rows of down sides, rows of routers: odd ones; and those of MALoRA and MoLoRA on a 7B and a 135M model
ODD = [
    (1, 8, 8, 0),
    (33, 72, 40, 8),
    (150, 72, 40, 8),
    (70, 100, 136, 16),
    (9, 40, 264, 0),
    (9, 40, 264, 8),
    (9, 40, 24, 264),
]
USED = [(4096, 4096, 96, 24), (4096, 11008, 32, 8), (4096, 4096, 192, 24), (1000, 576, 96, 24), (1000, 1536, 64, 8)]
USED += [(8192, 576, 256, 0), (8192, 1536, 128, 0)]  # and without routers
USED += [(1024, 576, 96, 192), (1024, 576, 256, 256), (1024, 576, 96, 768)]  # and of 64 experts and more


def kept(bits: torch.Tensor, n: int) -> torch.Tensor:
    return ((bits[:, :, None] >> torch.arange(32, device=bits.device)) & 1).flatten(1)[:, :n].bool()


@pytest.mark.parametrize("p, least_blocks", [(0.05, 1), (0.05, 16), (0.5, 16)])
@pytest.mark.parametrize("T, n, Z, L", ODD + USED if ON_GPU else ODD)
def test_products_equal_those_of_masked_tensors(T, n, Z, L, p, least_blocks, monkeypatch):
    """With sums in parts and in one."""
    monkeypatch.setattr(down_tiling, "MIN_BLOCKS_PER_SPLIT", least_blocks)
    torch.manual_seed(0)
    x, weights = (torch.randn(rows, n, device=DEVICE).to(DTYPE) for rows in (T, Z + L))
    dzl = down_tiling.aligned_rows(x, Z + L).copy_(torch.randn(T, Z + L))
    bits = dropout.mask(T, n, torch.tensor([5], device=DEVICE), p)
    wide = torch.float32 if ON_GPU else torch.float64
    left = kept(bits, n).to(wide) / (1 - round(dropout.LEVELS * p) / dropout.LEVELS)
    x_, w_, dzl_ = (t.to(wide) for t in (x, weights, dzl))
    base = torch.randn(T, n, device=DEVICE).to(DTYPE)
    expected = {
        "down": torch.cat([(x_ * left) @ w_[:Z].T, x_ @ w_[Z:].T], 1),
        "of input": left * (dzl_[:, :Z] @ w_[:Z]) + dzl_[:, Z:] @ w_[Z:],
        "of weights": torch.cat([dzl_[:, :Z].T @ (x_ * left), dzl_[:, Z:].T @ x_]),
    }
    expected["down, copied"] = expected["down"]
    expected["of input, added"] = expected["of input"] + base.to(wide)
    expected["of weights, of rows"] = expected["of weights"]
    got = {"down": down_forward.down(x, bits, weights, Z, p)}
    # x in wider ones, as the first product left it
    rows = torch.full((T, n + 32), torch.nan, dtype=DTYPE, device=DEVICE)
    got["down, copied"] = down_forward.down(x, bits, weights, Z, p, rows[:, :n])
    assert torch.equal(rows[:, :n], x) and rows[:, n:].isnan().all()
    e, z, narrow_z = (torch.randn(3, T, size, device=DEVICE).to(DTYPE) for size in (40, 24, 8))
    expected["of P"] = e[..., :36].to(wide).mT @ z[..., :20].to(wide)
    of_p = down_backward.SubspaceGrad(e, z, 36, 20)
    got["of input"], got["of weights"], got["of P"] = down_backward.gradients(dzl, x, bits, weights, Z, p, of_p=of_p)
    got["of input, added"], *others = down_backward.gradients(dzl, x, bits, weights, Z, p, base, of_weights=False)
    assert others == [None, None]
    dx, got["of weights, of rows"], dP = down_backward.gradients(dzl, rows[:, :n], bits, weights, Z, p, of_input=False)
    assert dx is dP is None
    expected["of P alone"], of_p = (
        e[..., :36].to(wide).mT @ narrow_z[..., :6].to(wide),
        down_backward.SubspaceGrad(e, narrow_z, 36, 6),
    )
    *others, got["of P alone"] = down_backward.gradients(
        dzl, x, bits, weights, Z, p, of_input=False, of_weights=False, of_p=of_p
    )
    assert others == [None, None]
    for name, value in expected.items():
        assert (got[name].to(wide) - value).norm() <= CLOSE * value.norm(), name


@pytest.mark.parametrize(
    "rows, first, rest, pad_rest",
    [(8, 16, 0, 16), (24, 32, 0, 16), (40, 32, 8, 16), (64, 64, 0, 16), (96, 64, 32, 32), (192, 128, 64, 64)],
)
def test_rows_are_two_blocks_where_those_are_smaller(rows, first, rest, pad_rest):
    assert tiling.split_tile(rows) == {"first": first, "rest": rest, "pad_rest": pad_rest}


def test_loads_have_the_stages_that_fit_and_products_for_which_none_do_are_plain(monkeypatch):
    x = torch.empty(1, dtype=torch.bfloat16)
    sizes = [(96, 24), (192, 24), (96, 192), (256, 256)]

    def stages(tuned):
        return [down_tiling._stages(tuned, Z, L, x.device) for Z, L in sizes]

    assert stages(down_tiling.DOWN) == [3, 3, 3, 3] and stages(down_tiling.GRADIENTS) == [3, 3, 3, 2]
    assert not any(down_tiling._plainly(x, Z, L) for Z, L in sizes) and down_tiling._plainly(x, 96, 264)
    monkeypatch.setattr(tiling, "shared_memory_bytes", lambda device: 99 << 10)  # of a GPU at home
    assert stages(down_tiling.DOWN) == [3, 2, 1, 1] and stages(down_tiling.GRADIENTS) == [3, 1, 0, 0]
    assert [down_tiling._plainly(x, Z, L) for Z, L in sizes] == [False, False, True, True]


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_a_mask_drops_the_share_it_should_and_no_pattern(p):
    T, n = 512, 256
    mask = kept(dropout.mask(T, n, torch.tensor([3], device=DEVICE), p), n).double()
    six_sigma = 6 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(1 - p - mask.mean()) < six_sigma + 1 / dropout.LEVELS
    for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(32, 1), mask.roll(8, 0)):
        assert abs(((mask - mask.mean()) * (shifted - mask.mean())).mean()) < six_sigma  # of a product of two such
    other = kept(dropout.mask(T, n, torch.tensor([4], device=DEVICE), p), n).double()
    assert abs(((mask - mask.mean()) * (other - mask.mean())).mean()) < six_sigma


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no races")
@pytest.mark.parametrize("T, n, Z, L", USED)
def test_a_product_is_the_same_every_time(T, n, Z, L):
    torch.manual_seed(0)
    x, weights = (torch.randn(rows, n, device=DEVICE).to(DTYPE) for rows in (T, Z + L))
    dzl = down_tiling.aligned_rows(x, Z + L).copy_(torch.randn(T, Z + L))
    bits = dropout.mask(T, n, torch.tensor([5], device=DEVICE), 0.05)
    of_p = down_backward.SubspaceGrad(*(torch.randn(3, T, size, device=DEVICE).to(DTYPE) for size in (96, 32)), 96, 32)
    products = {
        "down": lambda: down_forward.down(x, bits, weights, Z, 0.05),
        "gradients": lambda: torch.cat(
            [g.flatten() for g in down_backward.gradients(dzl, x, bits, weights, Z, 0.05, of_p=of_p)]
        ),
    }
    for name, scaled_matmul in products.items():
        first = scaled_matmul()
        others = torch.stack([(scaled_matmul() != first).any() for _ in range(3000)])
        assert not others.any(), f"{name}: {others.sum().item()} of 3000 differ"


COMPILE = """
import torch
from malora.backends import masked
from tests.malora.hopper import compiled
common = {"N_EACH": 576, "T_EACH": 1024, "PTX": True, "EVEN_T": True, "EVEN_N": True, "ADDS": False,
          "COPIES": True, "MOST_PARTS": 4}
types = {"bits_ptr": "*i32", "parts_ptr": "*fp32", "total_ptr": "*fp32", "count_ptr": "*i32"}
for Z, L in (256, 0), (64, 8), (96, 24), (96, 192), (256, 256):
    assert not masked._plainly(torch.empty(1), Z, L)
    weights = torch.empty(Z + L, 576, dtype=torch.bfloat16)
    for kernel, tuned, *of in (
        (masked._down_kernel, masked.DOWN),
        (masked._gradients_kernel, masked.GRADIENTS, True, True),
        (masked._gradients_kernel, masked.GRADIENTS, True, False),
        (masked._gradients_kernel, masked.GRADIENTS, False, True),
    ):
        sizes = masked._sizes(weights, Z, 0.05) | masked._fitting(tuned, Z, L, weights.device)
        sizes |= dict(zip(("OF_INPUT", "OF_WEIGHTS"), of)) | {"PTX": True}
        sizes |= {"G": 3, "H": 96, "D": 32, "PAD_H": 128, "PAD_D": 32}
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        code = compiled(kernel, common | sizes, types, ("T", "n"), **options)
        print(kernel.__name__, Z, L, code, end="\\f")
"""


def test_no_product_runs_on_while_its_loop_writes_what_it_reads(tmp_path):
    """Each is waited for within the pass that begins it: registers and buffers are written again by the next."""
    codes = printed(COMPILE, tmp_path)
    assert len(codes) == 20
    for code in codes:
        loops = 2 if code.startswith("_gradients_kernel") else 1  # the gradients of P have their own
        assert products_left_running(code) == [0] * loops, code[:40]
