"""The down projection with dropout, against matmuls of masked tensors.

They are equal, forward and backward.
In float64 through Triton's interpreter; on a GPU in bfloat16, at sizes in use.
"""

import pytest
import torch

from malora.fused.kernels import down_backward, down_forward, down_tiling, dropout
from malora.fused.kernels.down_backward import SubspaceGrad
from tests.malora.fused.hopper import run_compile_script, unfinished_matmuls
from tests.malora.fused.kernels.test_dropout import unpack

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 5e-3) if ON_GPU else ("cpu", torch.float64, 1e-12)
# Tokens, in features, rows of down projections, rows of routers. First unusual sizes.
ODD = [
    (1, 8, 8, 0),
    (33, 72, 40, 8),
    (150, 72, 40, 8),
    (70, 100, 136, 16),
    (9, 40, 264, 0),
    (9, 40, 264, 8),
    (9, 40, 24, 264),
]
# MALoRA and MoLoRA on a 7B and a 135M model; then without routers; then with 64 experts and more.
USED = [(4096, 4096, 96, 24), (4096, 11008, 32, 8), (4096, 4096, 192, 24), (1000, 576, 96, 24), (1000, 1536, 64, 8)]
USED += [(8192, 576, 256, 0), (8192, 1536, 128, 0)]
USED += [(1024, 576, 96, 192), (1024, 576, 256, 256), (1024, 576, 96, 768)]


@pytest.mark.parametrize("p, min_blocks", [(0.05, 1), (0.05, 16), (0.5, 16)])
@pytest.mark.parametrize("T, n, Z, L", ODD + USED if ON_GPU else ODD)
def test_results_equal_matmuls_of_masked_tensors(T, n, Z, L, p, min_blocks, monkeypatch):
    """With a split sum (split-K) and without."""
    monkeypatch.setattr(down_tiling, "MIN_BLOCKS_PER_SPLIT", min_blocks)
    torch.manual_seed(0)
    x, weights = (torch.randn(rows, n, device=DEVICE).to(DTYPE) for rows in (T, Z + L))
    d_down_out = down_tiling.aligned_rows(x, Z + L).copy_(torch.randn(T, Z + L))
    bits = dropout.draw_mask(T, n, torch.tensor([5], device=DEVICE), p)
    acc = torch.float32 if ON_GPU else torch.float64
    factor = unpack(bits, n).to(acc) / (1 - round(dropout.LEVELS * p) / dropout.LEVELS)
    x_acc, w_acc, d_acc = (t.to(acc) for t in (x, weights, d_down_out))
    dx_base = torch.randn(T, n, device=DEVICE).to(DTYPE)
    expected = {
        "down_out": torch.cat([(x_acc * factor) @ w_acc[:Z].T, x_acc @ w_acc[Z:].T], 1),
        "dx": factor * (d_acc[:, :Z] @ w_acc[:Z]) + d_acc[:, Z:] @ w_acc[Z:],
        "dweights": torch.cat([d_acc[:, :Z].T @ (x_acc * factor), d_acc[:, Z:].T @ x_acc]),
    }
    expected["down_out, with a copy"] = expected["down_out"]
    expected["dx, with dx_base"] = expected["dx"] + dx_base.to(acc)
    expected["dweights, of a column slice"] = expected["dweights"]
    got = {"down_out": down_forward.dropout_matmul(x, bits, weights, Z, p)}
    wider = torch.full((T, n + 32), torch.nan, dtype=DTYPE, device=DEVICE)
    got["down_out, with a copy"] = down_forward.dropout_matmul(x, bits, weights, Z, p, wider[:, :n])
    assert torch.equal(wider[:, :n], x) and wider[:, n:].isnan().all()
    gated_dh, z, small_z = (torch.randn(3, T, size, device=DEVICE).to(DTYPE) for size in (40, 24, 8))
    expected["dP"] = gated_dh[..., :36].to(acc).mT @ z[..., :20].to(acc)
    got["dx"], got["dweights"], got["dP"] = down_backward.down_proj_backward(
        d_down_out, x, bits, weights, Z, p, subspace=SubspaceGrad(gated_dh, z, 36, 20)
    )
    got["dx, with dx_base"], *others = down_backward.down_proj_backward(
        d_down_out, x, bits, weights, Z, p, dx_base, needs_dweights=False
    )
    assert others == [None, None]
    dx, got["dweights, of a column slice"], dP = down_backward.down_proj_backward(
        d_down_out, wider[:, :n], bits, weights, Z, p, needs_dx=False
    )
    assert dx is dP is None
    expected["dP alone"] = gated_dh[..., :36].to(acc).mT @ small_z[..., :6].to(acc)
    subspace = SubspaceGrad(gated_dh, small_z, 36, 6)
    *others, got["dP alone"] = down_backward.down_proj_backward(
        d_down_out, x, bits, weights, Z, p, needs_dx=False, needs_dweights=False, subspace=subspace
    )
    assert others == [None, None]
    for name, value in expected.items():
        assert (got[name].to(acc) - value).norm() <= TOLERANCE * value.norm(), name


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no races")
@pytest.mark.parametrize("T, n, Z, L", USED)
def test_results_are_the_same_every_time(T, n, Z, L):
    torch.manual_seed(0)
    x, weights = (torch.randn(rows, n, device=DEVICE).to(DTYPE) for rows in (T, Z + L))
    d_down_out = down_tiling.aligned_rows(x, Z + L).copy_(torch.randn(T, Z + L))
    bits = dropout.draw_mask(T, n, torch.tensor([5], device=DEVICE), 0.05)
    subspace = SubspaceGrad(*(torch.randn(3, T, size, device=DEVICE).to(DTYPE) for size in (96, 32)), 96, 32)

    def forward():
        return down_forward.dropout_matmul(x, bits, weights, Z, 0.05)

    def backward():
        grads = down_backward.down_proj_backward(d_down_out, x, bits, weights, Z, 0.05, subspace=subspace)
        return torch.cat([grad.flatten() for grad in grads])

    for compute in (forward, backward):
        first = compute()
        others = torch.stack([(compute() != first).any() for _ in range(3000)])
        assert not others.any(), f"{compute.__name__}: {others.sum().item()} of 3000 differ"


COMPILE = """
import torch
from malora.fused.kernels import down_backward, down_forward, down_tiling
from tests.malora.fused.hopper import compile_for_hopper
common = {"N_PER_SPLIT": 576, "T_PER_SPLIT": 1024, "EVEN_T": True, "EVEN_N": True, "HAS_DX_BASE": False,
          "WRITE_COPY": True, "MAX_SPLITS": 4, "G": 3, "H": 96, "D": 32, "PAD_H": 128, "PAD_D": 32}
types = {"bits_ptr": "*i32", "splits_ptr": "*fp32", "sum_ptr": "*fp32", "counter_ptr": "*i32"}
for Z, L in (256, 0), (64, 8), (96, 24), (96, 192), (256, 256):
    assert not down_tiling.prefers_plain_matmul(torch.empty(1), Z, L)
    weights = torch.empty(Z + L, 576, dtype=torch.bfloat16)
    for kernel, launch, *needs in (
        (down_forward._dropout_matmul_kernel, down_tiling.FORWARD),
        (down_backward._down_proj_backward_kernel, down_tiling.BACKWARD, True, True),
        (down_backward._down_proj_backward_kernel, down_tiling.BACKWARD, True, False),
        (down_backward._down_proj_backward_kernel, down_tiling.BACKWARD, False, True),
    ):
        if False in needs and (Z, L) not in ((64, 8), (256, 256)):
            continue  # each takes a second to compile, and has no loop that the kernel of both gradients lacks
        options = launch.options(Z, L, weights.device)
        constants = common | down_tiling.tile_constants(weights, Z, 0.05) | {"PTX": True}
        constants |= dict(zip(("NEEDS_DX", "NEEDS_DW"), needs))
        constants |= {name: options.pop(name) for name in ("BLOCK_T", "BLOCK_N")}
        code = compile_for_hopper(kernel, constants, types, ("T", "n"), **options)
        print(kernel.__name__, Z, L, code, end="\\f")
"""


def test_no_matmul_is_unfinished_when_its_loop_overwrites_its_operands(tmp_path):
    """Check that each matmul is waited for within its iteration.

    The next iteration writes the same registers and buffers.
    """
    codes = run_compile_script(COMPILE, tmp_path)
    assert len(codes) == 14
    for code in codes:
        loops = 2 if code.startswith("_down_proj_backward_kernel") else 1  # dP has a loop of its own
        assert unfinished_matmuls(code) == [0] * loops, code[:40]
