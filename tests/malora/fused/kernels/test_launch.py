"""Launches that remember their compiled kernel, with a stand-in for Triton's compiler."""

import pytest
import torch

from malora.fused.kernels import launch as launching


class FakeKernel:
    """Stand for a function under `triton.jit` with the parameters x, n, SCALE and BLOCK."""

    arg_names = ("x", "n", "SCALE", "BLOCK")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **constants):
            self.compiled.append((args[1:], constants))
            return Compiled(self)

        return compile_and_launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((grid, *args[1:]))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching.triton, "JITFunction", FakeKernel)
    monkeypatch.setattr(launching.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "_remembered", {})
    return FakeKernel()


def test_a_second_launch_gets_all_arguments_without_compiling(kernel):
    x = torch.zeros(64)
    for _ in range(2):  # BLOCK comes before SCALE, and the launch option is no parameter
        launching.launch(kernel, (3, 2), x, 7, BLOCK=16, num_warps=4, SCALE=2.0)
    assert len(kernel.compiled) == 1
    assert kernel.launched == [((3, 2, 1), 7, 2.0, 16)]


@pytest.mark.parametrize(
    "x, n, constants",
    [
        (torch.zeros(64, dtype=torch.float16), 7, {}),
        (torch.zeros(65)[1:], 7, {}),  # another alignment
        (torch.zeros(64), 8, {}),
        (None, 7, {}),
        ((torch.zeros(64), torch.zeros(64)), 7, {}),
        (torch.zeros(64), 7, {"SCALE": 3.0}),
        (torch.zeros(64), 7, {"num_warps": 8}),
    ],
)
def test_what_triton_specializes_on_is_compiled_anew(kernel, x, n, constants):
    usual = {"BLOCK": 16, "num_warps": 4, "SCALE": 2.0}
    launching.launch(kernel, (1,), torch.zeros(64), 7, **usual)
    launching.launch(kernel, (1,), x, n, **usual | constants)
    assert len(kernel.compiled) == 2 and kernel.launched == []


def test_what_is_remembered_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launching, "MAX_REMEMBERED", 4)
    for n in range(10):
        launching.launch(kernel, (1,), torch.zeros(64), n, BLOCK=16, SCALE=2.0)
    assert len(kernel.compiled) == 10 and len(launching._remembered) <= 4
