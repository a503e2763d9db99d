"""Figures of time that hold on other machines: ratios to something plain, measured next to it.

They are ratios of CPU time, which does not grow when other programs use the machine. Everything runs in one thread.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

import malora
from bench.records.provenance import ROOT
from bench.regress.figures import Figures, Measured

IMPORTS = 3  # processes, of which the fastest counts
_IMPORT_PROGRAM = """
import time, sys
times = [time.process_time()]
import torch, transformers, peft
times.append(time.process_time())
before = set(sys.modules)
import malora
times.append(time.process_time())
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {name.partition(".")[0] for name in before}
print(times[1] - times[0], times[2] - times[1], *sorted(new))
"""

WIDTH, EXPERTS, RANK, TOP_K = 512, 8, 8, 2
# Many tokens show the time of the matmuls, and one token, as in decoding, that of Python around them.
SIZES = {"many_tokens": 512, "one_token": 1}
# The backends of a CPU, as (method, backend): how the default computes, and the sparse one.
LAYERS = (("malora", "auto"), ("molora", "auto"), ("molora", "dispatch"))
ROUNDS = 40  # each times every layer once; the fastest pass of each counts


def measure_imports() -> Figures:
    """Return the time of `import malora` over that of what it needs: torch, transformers and peft.

    The packages that it loads besides those are a figure too.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    needed, own, packages = [], [], ""
    for _ in range(IMPORTS):
        command = [sys.executable, "-W", "ignore", "-c", _IMPORT_PROGRAM]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        first, second, *names = printed.split()
        needed.append(float(first))
        own.append(float(second))
        packages = " ".join(names)
    return {
        "imports.malora": Measured(_short(min(own) / min(needed)), "cost"),
        "imports.packages": Measured(packages, "here"),
    }


def measure_layers() -> Figures:
    """Return the time of a layer's forward and backward pass over that of the same expert sum in plain PyTorch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            linear = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
            layers = {"plain": _plain_layer(linear)}
            layers |= {f"{method}.{backend}": _layer(linear, method, backend) for method, backend in LAYERS}
            found: Figures = {}
            for size, tokens in SIZES.items():
                x, dy = torch.randn(1, tokens, WIDTH, requires_grad=True), torch.randn(1, tokens, WIDTH)
                seconds = _fastest({name: _make_pass(layer, x, dy) for name, layer in layers.items()})
                plain = seconds.pop("plain")
                found |= {f"layer.{name}.{size}": Measured(_short(s / plain), "cost") for name, s in seconds.items()}
            return found
    finally:
        torch.set_num_threads(threads)


def _make_pass(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return a forward and backward pass to the input and the adapter's weights."""

    def run_pass() -> None:
        layer(x).backward(dy)

    return run_pass


def _layer(linear: nn.Linear, method: str, backend: str) -> Callable[[Tensor], Tensor]:
    """Return a linear layer with an adapter of one of our methods."""
    copy = nn.Linear(WIDTH, WIDTH, bias=False)
    copy.weight = linear.weight
    model: Any = nn.Sequential(OrderedDict(linear=copy))  # PEFT takes any module, but says it takes transformers' only
    options = {"num_experts": EXPERTS, "r": RANK, "lora_alpha": 2 * RANK, "top_k": TOP_K, "lora_dropout": 0.0}
    config = malora.make_config(method, **options, backend=backend, target_modules=["linear"], task_type=None)
    return get_peft_model(model, config)


def _plain_layer(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return a linear layer with LoRA experts of independent factors, as one would write it down."""
    down = nn.Parameter(0.02 * torch.randn(EXPERTS * RANK, WIDTH))
    up = nn.Parameter(0.02 * torch.randn(EXPERTS * RANK, WIDTH))
    router = nn.Parameter(0.02 * torch.randn(EXPERTS, WIDTH))

    def forward(x: Tensor) -> Tensor:
        probability = F.linear(x, router).softmax(-1)
        top = probability.topk(TOP_K, dim=-1)
        gate = torch.zeros_like(probability).scatter(-1, top.indices, top.values)
        h = F.linear(x, down).unflatten(-1, (EXPERTS, RANK)) * gate.unsqueeze(-1)
        y: Tensor = linear(x) + 2.0 * h.flatten(-2) @ up
        return y

    return forward


def _fastest(passes: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Time passes in turn, and return the CPU seconds of the fastest of each."""
    samples: dict[str, list[float]] = {name: [] for name in passes}
    gc.collect()
    for number in range(ROUNDS):
        order = list(passes.items())
        for name, run_pass in reversed(order) if number % 2 else order:
            start = time.process_time()
            run_pass()
            samples[name].append(time.process_time() - start)
    return {name: min(taken) for name, taken in samples.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
