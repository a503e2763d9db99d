"""Scaled transposes in the padding of augmented weights.

They run through the interpreter or on a GPU.
"""

import pytest
import torch

from malora.fused.kernels.transpose_copy import write_up_proj
from tests.malora.fused.hopper import run_compile_script

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("H, sizes", [(8, [48]), (40, [130, 16, 257])])
def test_the_last_columns_are_the_scaled_transpose_and_the_others_stay(H, sizes):
    torch.manual_seed(0)
    weights = [torch.randn(m, 32 + H, device=DEVICE) for m in sizes]
    Bs = [torch.randn(H, m, device=DEVICE) for m in sizes]
    before = [weight.clone() for weight in weights]
    write_up_proj(weights, Bs, 0.5)
    for weight, B, old in zip(weights, Bs, before, strict=True):
        assert torch.equal(weight, torch.cat([old[:, :32], 0.5 * B.T], 1))


COMPILE = """
from malora.fused.kernels import transpose_copy
from tests.malora.fused.hopper import compile_for_hopper
constants = {"SCALE": 2.0, "BLOCK_H": 32, "BLOCK_M": 128}
print(compile_for_hopper(transpose_copy._write_one_up_proj, constants, aligned=("H", "m")), end="\\f")
"""


def test_the_transpose_is_written_by_one_vectorized_store(tmp_path):
    (code,) = run_compile_script(COMPILE, tmp_path)
    assert "tt.trans" in code and code.count("tt.store") == 1
